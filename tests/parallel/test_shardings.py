"""Every array of every family has a declared place, and the places are those that were committed."""

import difflib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from multitap_jax.config import MeshConfig, TrainableConfig, TrainConfig
from multitap_jax.families import FAMILIES, settle
from multitap_jax.parallel.listing import listing, placements
from multitap_jax.parallel.mesh import abstract_mesh
from multitap_jax.planning.programs import abstract_model, held
from multitap_jax.planning.published import PUBLISHED, read_model
from tests.shardings import CASES, CONFIGS, FOLDER, file_of, text_of

MESH = abstract_mesh(MeshConfig(data=2, fsdp=4, tensor=2), 16)
# transformers' defaults where there is no published size in the package.
MODELS = {**{name: {} for name in PUBLISHED if "72b" not in name}, "llava": {}, "llava_onevision": {}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}_{case[1]}")
def test_the_places_are_those_that_were_committed(case):
    kept, found = file_of(*case[:2]).read_text().splitlines(), text_of(*case).splitlines()
    diff = "\n".join(difflib.unified_diff(kept, found, "committed", "found", lineterm="", n=0))
    assert not diff, f"{diff}\n\nif this is meant: python -m tests.shardings"


def test_every_config_is_kept_and_nothing_else():
    assert {case[0] for case in CASES} == {path.stem for path in CONFIGS.glob("*.py")}
    assert {path.name for path in FOLDER.glob("*")} == {file_of(*case[:2]).name for case in CASES}


@pytest.mark.parametrize("parts", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_every_array_has_a_place_and_nothing_large_lies_whole_on_a_device(name, parts):
    config = TrainConfig(trainable=TrainableConfig(parts=parts))
    family, numbers = read_model(name) if name in PUBLISHED else settle({"model_type": name})
    state, frozen = held(abstract_model(family, numbers, config), config, MESH)
    arrays = [array for tree in (state, frozen) for array in placements(tree)]
    assert len(arrays) > 50
    for array in arrays:  # what is left whole: gates, scalars, norms of heads, and one dimension of adapters
        assert not array.whole or array.bytes < 2**20, array
    total = sum(array.bytes for array in arrays)
    assert sum(array.bytes_per_device for array in arrays) < 0.15 * total  # of 8 shares, and two copies (data)


def test_all_families_are_among_them():
    kinds = {PUBLISHED[name]["model_type"] if name in PUBLISHED else name for name in MODELS}
    assert kinds == set(FAMILIES)


def test_moments_lie_where_their_parameters_lie():
    config = TrainConfig()
    state = held(abstract_model(*read_model("qwen2-vl-2b"), config), config, MESH).state
    params = {array.name: array for array in placements(state.trainable)}
    moments = [array for array in placements(state.opt_state) if ".mu." in array.name or ".nu." in array.name]
    assert len(moments) == 2 * len(params)
    for moment in moments:
        parameter = params[moment.name.partition(".mu.")[2] or moment.name.partition(".nu.")[2]]
        assert (moment.spec, moment.axes, moment.dtype) == (parameter.spec, parameter.axes, "float32")


def test_an_array_without_a_place_is_named():
    with pytest.raises(ValueError, match=r"no sharding is declared for lost, nested\.0"):
        placements({"lost": jax.ShapeDtypeStruct((2,), jnp.float32), "nested": [jnp.zeros(3)]})


def test_a_listing_reads_like_this():
    place = lambda *spec: jax.sharding.NamedSharding(MESH, P(*spec))
    tree = {
        "a": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=place(("data", "fsdp"), "tensor")),
        "b": jax.ShapeDtypeStruct((), jnp.int32, sharding=place()),
    }
    assert listing(MESH, {"part": tree, "empty": {}}) == (
        "mesh data=2, fsdp=4, tensor=2, context=1: 16 devices\n\npart:\n"
        "  a  float32[8,6]  (data+fsdp, tensor)             12\n"
        "  b  int32[]       ()                               4\n"
        "  2 arrays, 16 bytes on each device, of which 4 are the same on all\n"
    )
