"""InternLM-XComposer2.5 against its published code (goldens) and a reference in NumPy: states, gradients, modules."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from multitap_jax.backbones.attention import make_visibility
from multitap_jax.backbones.config import Section
from multitap_jax.backbones.overview import with_overview
from multitap_jax.backbones.rope import Rope
from multitap_jax.data.hd import HdLayout
from multitap_jax.data.stream import Pair
from multitap_jax.families import read_config
from multitap_jax.weights.hub import load_backbone
from tests.families.checks import assert_same_gradients as assert_ours_agree
from tests.families.checks import check_mesh, total_and_states
from tests.families.common import (
    FLOAT32,
    GRADIENT_TOLERANCE,
    QUICK,
    TOLERANCE,
    batches,
    contract_of,
    forward,
    gradients,
    picture,
    states,
)
from tests.families.internlm2 import (
    GOLDENS,
    HD,
    LARGE,
    PAIRS,
    READINGS,
    SIDE,
    TALL,
    WIDE,
    gradient_errors,
    oracle,
    tokenizer,
)
from tests.families.xcomposer_reference import Reference, transformed

FOUND = json.loads(GOLDENS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each reading, all with the same weights."""
    out = {}
    for name, (entries, _) in READINGS.items():
        out[name] = oracle(**entries).write_without_torch(tmp_path_factory.mktemp("xcomposer"))
    return out


@pytest.fixture(scope="module")
def folder(folders):
    return folders["tiles"]


def tiled(folder, **chosen):
    return contract_of(folder, **{"image_policy": HD, **chosen})


def assert_golden(name, found):
    """The values of an array that the golden of this name keeps."""
    kept = FOUND["modules"][name]
    found = np.asarray(found)
    assert list(found.shape) == kept["shape"], name
    places = np.random.default_rng(zlib.crc32(name.encode())).integers(0, found.size, len(kept["values"]))
    np.testing.assert_allclose(found.reshape(-1)[places], kept["values"], atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", READINGS)
def test_states_equal_the_published_code(folders, name):
    """Without, with one and with two pictures, of one tile and of several; texts of one picture share it."""
    folder, expected = folders[name], np.asarray(FOUND["states"][name])
    got = states(load_backbone(folder), folder, PAIRS, contract_of(folder, **READINGS[name][1]))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got[:, ::4], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", READINGS)
def test_states_equal_the_reference(folders, name):
    folder, (entries, chosen) = folders[name], READINGS[name]
    contract = contract_of(folder, **chosen)
    reference = Reference(folder, applied=not entries, raw=bool(entries))
    most = int(contract.image_policy.removeprefix("hd:")) if "hd" in contract.image_policy else None
    expected = []
    for ids, pair in zip(FOUND["ids"][contract.prompt], PAIRS, strict=True):
        shown = [transformed(image, SIDE, most) if most else image.resize((SIDE, SIDE)) for image in pair.images]
        expected.append(reference(ids, shown)[-1][-1])
    got = states(load_backbone(folder), folder, PAIRS, contract)
    np.testing.assert_allclose(got, np.stack(expected), atol=TOLERANCE, rtol=0)


def test_the_readings_differ(folders, tmp_path):
    """So the agreements above are no accident: additions and pixel statistics each move the states of pictures."""
    base = folders["one view"]
    contract, with_images = contract_of(base), np.array([bool(pair.images) for pair in PAIRS])
    expected = states(load_backbone(base), base, PAIRS, contract)
    for entry in READINGS["official"][0].items():
        (tmp_path / entry[0]).mkdir()
        other = oracle(**dict([entry])).write_without_torch(tmp_path / entry[0])
        apart = np.abs(states(load_backbone(other), other, PAIRS, contract) - expected).max(axis=1)
        assert (apart[with_images] > 0.01).all(), entry
        assert (apart[~with_images] == 0).all(), entry


def test_gradients_equal_the_published_code(folder):
    """Of every parameter: its largest entry, and two random sums of all entries.

    What moves no pooled state has none: the last layer's additions of image tokens but those to keys and values.
    """
    got = gradients(load_backbone(folder), folder, PAIRS, tiled(folder))
    still = {key for key, gradient in got.items() if not np.abs(gradient).max() > 0}
    assert got.keys() - FOUND["gradients"].keys() == still
    last = [f"model.layers.1.{name}" for name in ("attention.wo", *(f"feed_forward.w{n}" for n in (1, 2, 3)))]
    assert still == {f"{name}.Plora_{side}.weight" for name in last for side in "AB"}
    wrong = {
        key: error for key, error in gradient_errors(got, FOUND["gradients"]).items() if error > GRADIENT_TOLERANCE
    }
    assert not wrong, wrong


def test_pixels_tower_and_projector_equal_the_published_code(folder):
    """Of a picture of two by two tiles: the views that are seen, each layer, the joined cells, the tokens."""
    contract, backbone = tiled(folder), load_backbone(folder)
    (batch,) = batches(folder, [Pair((LARGE,), "a")], contract)
    views, side = 5, SIDE // 14
    seen = np.asarray(backbone.config.vision.pixels.normalise(with_overview(batch, side).patches))[0, : views * side**2]
    seen = seen.reshape(views, side, side, 3, 14, 14).transpose(0, 3, 1, 4, 2, 5).reshape(views, 3, SIDE, SIDE)
    assert_golden("views", seen)
    made = batch._replace(patches=with_overview(batch, side).patches)
    for number, hidden in enumerate(backbone.vision.tower.hidden_states(made, FLOAT32)):
        assert_golden(f"tower {number}", hidden[:views])
    features = np.asarray(backbone.vision(batch, FLOAT32)).reshape(-1, 64)
    tokens = HdLayout(HD, 14, SIDE, 2).token_cells((2, 2))
    assert_golden("projected", features[tokens][None])
    cells = batch.image_cell[0][batch.image_cell[0] >= 0]
    np.testing.assert_array_equal(cells, tokens)


def test_every_decoder_layer_equals_the_published_code(folder):
    """And the reference, of a pair with two pictures."""
    (batch,) = batches(folder, [PAIRS[3]], tiled(folder))
    found = np.asarray(load_backbone(folder).hidden_states(batch, FLOAT32))[:, 0]
    length = int((batch.segment[0] > 0).sum())
    shown = [transformed(image, SIDE, 6) for image in PAIRS[3].images]
    expected = Reference(folder)(FOUND["ids"]["official-train"][3], shown)
    assert len(found) == len(expected) - 1 == 3
    for number, hidden in enumerate(found[:, :length]):
        if number < 2:  # the published code keeps the last layer's output only behind the norm
            assert_golden(f"decoder {number}", hidden)
        np.testing.assert_allclose(hidden, expected[number], atol=TOLERANCE, rtol=0)


def test_modules_equal_the_published_code(folder):
    """The fused projection with its additions, attention, MLP: of noise, four in ten tokens being image tokens."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((1, 10, 64)).astype(np.float32))
    image = jnp.asarray(rng.random((1, 10)) < 0.4)
    text = load_backbone(folder).text
    layer = jax.tree.map(lambda leaf: leaf[0], text.layers)
    positions = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32)[None, :, None], (1, 10, 3))
    shared = text.config.rope.angles(positions, 16), make_visibility(np.ones((1, 10), np.int32), causal=True)
    assert_golden("partial linear", layer.attention.qkv_proj(x, image))
    assert_golden("attention", layer.attention(x, *shared, image))
    assert_golden("mlp", layer.mlp(x, image))


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_rotary_positions_equal_the_published_code(kind):
    """At the last position that "dynamic" leaves alone; the one behind it is none."""
    scaling = {"type": kind, "factor": 2.0 if kind == "dynamic" else 4.0}
    entries = {"rope_scaling": scaling, "rope_theta": 1e6, "max_position_embeddings": 32}
    rope = Rope.from_hf(Section(entries), theta=1.0)
    at = lambda place: np.stack(rope.angles(jnp.full((1, 1, 3), place, jnp.int32), 16))[:, 0, 0, 0]
    kept = FOUND["modules"][f"rope {kind}"]
    np.testing.assert_allclose(at(31), np.reshape(kept["values"], kept["shape"]), atol=1e-6, rtol=0)
    assert np.isnan(at(32)).all() == (kind == "dynamic")


def test_tiles_of_any_size_are_those_of_the_published_code():
    for width, height, most, down, across in FOUND["sizes"]:
        assert HdLayout(f"hd:{most}", 14, 560, 2).grid(height, width) == (down, across)
        tokens = (down * across + 1) * 400 + 1 + (down + 1) * 20
        assert HdLayout(f"hd:{most}", 14, 560, 2).num_tokens((down, across)) == tokens
    assert HdLayout("square:560", 14, 560, 2).num_tokens(()) == 841


def test_pixels_of_tiles_are_those_of_the_published_code():
    for width, height, most, checksum in FOUND["pixels"]:
        layout, image = HdLayout(f"hd:{most}", 14, SIDE, 2), picture(width, height, 1)
        down, across = layout.grid(height, width)
        tiles = layout.cut(image, (down, across))[-down * across * 16 :]
        tiles = tiles.reshape(down, across, 4, 4, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
        found = tiles.reshape(down * SIDE, across * SIDE, 3)
        assert zlib.crc32(found.tobytes()) == checksum, (width, height, most)
        np.testing.assert_array_equal(found, np.asarray(transformed(image, SIDE, most)))


def test_the_square_is_the_picture_that_the_processor_would_show_whole():
    """A tile of its own size is the whole, too, and is encoded once for both."""
    square, tiles = HdLayout(f"square:{SIDE}", 14, SIDE, 2), HdLayout("hd:24", 14, SIDE, 2)
    stretched = WIDE.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert tiles.grid(SIDE, SIDE) == (1, 1)
    np.testing.assert_array_equal(square.cut(WIDE, ()), tiles.cut(stretched, (1, 1)))
    np.testing.assert_array_equal(square.token_cells(()), tiles.token_cells((1, 1)))
    assert square.num_patches(()) == tiles.num_patches((1, 1)) == 16
    assert (square.token_cells(()) == square.block[1] - 1).sum() == 1  # one separator


def test_a_pair_gets_what_it_gets_alone(folder):
    """One picture and several texts, values and gradients, against pair by pair; two pictures; none."""
    contract, backbone = tiled(folder), load_backbone(folder)
    pairs = [*(Pair((WIDE,), text) for text in ("a red ball", "the blue box")), PAIRS[3], PAIRS[6]]
    (batch,) = batches(folder, pairs, contract)
    assert (batch.segment != batch.prefix).any()  # texts beside a prefix that they share
    run = jax.value_and_grad(lambda *x: total_and_states(lambda m, b: m(b, FLOAT32), *x), has_aux=True)
    step = jax.jit(run, compiler_options=QUICK)
    (_, together), found = step(backbone, batch)
    total = jax.tree.map(jnp.zeros_like, found)
    for index, pair in enumerate(pairs):
        (alone,) = batches(folder, [pair], contract)
        (_, states), gradient = step(backbone, alone)
        got, expected = np.asarray(together)[batch.record == index], np.asarray(states)[alone.record == 0]
        np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0)
        total = jax.tree.map(jnp.add, total, gradient)
    assert_ours_agree(found, total, floor=1e-3)


def test_one_device_and_eight(folder):
    pairs = [Pair((picture(60 + 35 * i, 90, i),), f"a red ball {i}") for i in range(8)]
    check_mesh(folder, pairs, gradient=True, image_policy=HD)


def test_a_view_of_the_whole_is_blind_to_other_pictures(folder):
    """Pictures beside it in a vision row, and padding, change nothing of a picture's views."""
    (batch,) = batches(folder, [Pair((LARGE, TALL, WIDE), "a")], tiled(folder))
    whole = np.asarray(with_overview(batch, 4).patches)
    for number in np.unique(batch.patch_segment[0])[1:]:
        own = batch.patch_segment == number
        alone = batch._replace(
            patches=np.where(own[:, :, None], batch.patches, 0).astype(np.uint8),
            patch_segment=np.where(own, number, 0).astype(np.int32),
        )
        np.testing.assert_array_equal(np.asarray(with_overview(alone, 4).patches)[own], whole[own])


def test_image_tokens_alone_get_the_additions(folder):
    """Weights of the additions that are large change pairs with pictures, and pairs without by no bit."""
    contract, backbone = tiled(folder), load_backbone(folder)
    before = states(backbone, folder, PAIRS, contract)
    for path, module in nnx.iter_modules(backbone):
        if path and path[-1] == "partial_b":
            module.kernel[...] = module.kernel[...] * 3
    after = states(backbone, folder, PAIRS, contract)
    with_images = np.array([bool(pair.images) for pair in PAIRS])
    assert (np.abs(after - before).max(axis=1)[with_images] > 0.01).all()
    np.testing.assert_array_equal(after[~with_images], before[~with_images])


def test_execution_changes_no_state(folder):
    from multitap_jax.backbones import Execution

    backbone, (batch,) = load_backbone(folder), batches(folder, PAIRS, tiled(folder))
    here = batch.record >= 0
    expected = np.asarray(forward(backbone, batch, FLOAT32))[here]
    for other in (Execution(attention="blockwise", layers="loop"), Execution(attention="chunked", remat="full")):
        np.testing.assert_allclose(np.asarray(forward(backbone, batch, other))[here], expected, atol=1e-5, rtol=0)
    short = np.asarray(forward(backbone, batch, Execution(dtype="bfloat16")))[here]
    assert 0 < np.linalg.norm(short - expected) / np.linalg.norm(expected) < 0.05


def test_the_default_is_one_view(folder):
    family, config = read_config(folder)
    assert (contract_of(folder).image_policy, contract_of(folder).position_mode) == (f"square:{SIDE}", "flat")
    assert config.image_token_id == tokenizer().convert_tokens_to_ids(family.chat.placeholder)
