"""Qwen2.5-VL against transformers, from pictures and texts to states, gradients and scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones.attention import Setup, attention, blockwise, make_visibility
from multitap_jax.backbones.qwen2_5_vl import Qwen25VLConfig
from multitap_jax.backbones.windows import (
    Local,
    local_attention,
    make_local_visibility,
    sort_cells,
    sort_windows,
    unsort_cells,
)
from multitap_jax.config import ConfigError
from multitap_jax.data.stream import Pair
from multitap_jax.families import from_config, num_params
from multitap_jax.flops import count_work, forward_flops
from multitap_jax.weights.hub import load_backbone
from tests.families import checks, qwen_checks
from tests.families.common import QUICK, batches, check_parity, contract_of
from tests.families.qwen2_5_vl import config, oracle
from tests.families.qwen2_vl import POLICY
from tests.families.qwen_checks import PAIRS, SMALL, WIDE
from tests.tiny_qwen2_vl import block_major


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    return oracle(), oracle().write(folder), folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 16)


@pytest.mark.parametrize("prompt", ["official-train", "official-eval"])
def test_states_equal_transformers(model, prompt):
    check_parity(*model, PAIRS, prompt=prompt, image_policy=POLICY)


def test_states_without_pictures_equal_transformers(model):
    check_parity(*model, PAIRS[-1:], image_policy=POLICY)


def test_gradients_equal_transformers(model):
    check_parity(*model, PAIRS[:4], gradient=True, image_policy=POLICY)


def test_every_layer_equals_transformers(model):
    from transformers.vision_utils import get_vision_window_index

    _, torch_model, folder = model
    pair = Pair((WIDE, SMALL), "a ball")
    run, given = qwen_checks.runner(*model, pair, image_policy=POLICY)
    (batch,) = batches(folder, [pair], contract_of(folder, image_policy=POLICY))
    backbone, real = load_backbone(folder), batch.patch_segment > 0
    order, _ = get_vision_window_index(given["image_grid_thw"], 2, 56, 14)
    visual = torch_model.model.visual

    ours, cells, text = qwen_checks.layer_states(backbone, batch)
    theirs = qwen_checks.recorded([visual.patch_embed, *visual.blocks], run)
    assert len(ours) == len(theirs) == 4
    for index, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        if index:  # transformers' blocks work on patches in the order of windows
            yours = yours.reshape(len(order), -1)[np.argsort(order)].reshape(yours.shape)
        checks.assert_near(mine[real], yours)
    merged = qwen_checks.recorded([visual.merger], run)[0][np.argsort(order)]
    checks.assert_near(cells[real[:, ::4]], merged)

    layers = torch_model.model.language_model.layers
    expected = [qwen_checks.recorded(layers[:1], run, inputs=True)[0], *qwen_checks.recorded(layers, run)]
    for mine, yours in zip(text[:, batch.segment > 0], expected, strict=True):
        checks.assert_near(mine, yours[0])


def test_packing_equals_each_pair_alone(model):
    qwen_checks.check_packing(model[2], PAIRS, image_policy=POLICY)


def test_execution_changes_neither_states_nor_gradients(model):
    qwen_checks.check_executions(model[2], PAIRS, image_policy=POLICY)


def test_a_mesh_changes_nothing(model):
    checks.check_mesh(model[2], PAIRS, image_policy=POLICY)


def test_weights_go_in_and_out_unchanged(model, tmp_path):
    checks.check_weights(*model, tmp_path)


def test_tied_weights_go_in_and_out_unchanged(tmp_path):
    tied = oracle(tie_word_embeddings=True)
    (tmp_path / "folder").mkdir()
    checks.check_weights(tied, tied.write(tmp_path / "folder"), tmp_path / "folder", tmp_path)


def test_score_equals_transformers(model, tmp_path):
    checks.check_score(*model, tmp_path, PAIRS[:6], image_policy=POLICY)


def rows_of_windows() -> tuple[jax.Array, jax.Array]:
    """Position and segment of two rows: pictures of 10 x 6 and 4 x 2 patches and padding; one of 6 x 14 patches."""
    first = np.concatenate([block_major(10, 6), block_major(4, 2), np.zeros((16, 2), np.int32)])
    segment = np.stack([np.repeat([1, 2, 0], [60, 8, 16]), np.ones(84)]).astype(np.int32)
    return jnp.asarray(np.stack([first, block_major(6, 14)])), jnp.asarray(segment)


def window_ids(position: np.ndarray, segment: np.ndarray, side: int) -> np.ndarray:
    """One number a window in the batch's own order; 0 is padding."""
    number = segment * 10000 + position[:, :, 0] // side * 100 + position[:, :, 1] // side
    return np.where(segment > 0, number, 0)


@pytest.mark.parametrize("backend", ["dense", "blockwise", "chunked"])
def test_sorted_windows_equal_a_mask(backend):
    """Attention among sorted blocks against the mask over window ids in the batch's own order, and its gradients."""
    position, segment = rows_of_windows()
    order, ids = sort_windows(position, segment, 4, 4)
    local = make_local_visibility(ids, 16, setup=Setup(backend))
    assert isinstance(local, Local)
    mask = make_visibility(jnp.asarray(window_ids(np.asarray(position), np.asarray(segment), 4)), causal=False)
    q, k, v = (jax.random.normal(key, (2, 84, 2, 8), jnp.float32) for key in jax.random.split(jax.random.key(0), 3))
    real = segment[:, :, None, None] > 0

    def through_blocks(q, k, v):
        out = local_attention(*(sort_cells(x, order) for x in (q, k, v)), local)
        return jnp.where(real, unsort_cells(out, order), 0.0)

    def through_mask(q, k, v):
        return jnp.where(real, attention(q, k, v, mask), 0.0)

    def both(attend):
        total = lambda *x: (jnp.sum(jnp.sin(attend(*x))), attend(*x))
        (_, out), gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True), compiler_options=QUICK)(
            q, k, v
        )
        return out, *gradient

    for ours, theirs in zip(both(through_blocks), both(through_mask), strict=True):
        checks.assert_near(ours, theirs)


def test_sorting_is_undone():
    position, segment = rows_of_windows()
    order, ids = sort_windows(position, segment, 4, 4)
    x = jnp.arange(2 * 84 * 3).reshape(2, 84, 3)
    np.testing.assert_array_equal(unsort_cells(sort_cells(x, order), order), x)
    sizes = np.bincount(np.asarray(ids)[0])
    assert sizes[sizes > 0].tolist() == [16, 16, 8, 16, 8, 8, 4, 8]  # 10 x 6 patches in windows of 4 x 4, then 4 x 2


def test_flops_count_what_windows_let_see(model):
    folder = model[2]
    backbone = load_backbone(folder)
    (batch,) = batches(folder, PAIRS, contract_of(folder, image_policy=POLICY))
    work = count_work(batch, window=backbone.config.window)
    ids = window_ids(batch.patch_position, batch.patch_segment, 4)
    same = lambda ids: int(((ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]).sum())
    assert (work.patch_pairs, work.window_pairs) == (same(batch.patch_segment), same(ids))
    v, n = backbone.config.vision, work.patches
    linear = 3 * 2 * n * (4 * v.size**2 + 3 * v.size * v.intermediate_size) + 2 * n * 588 * v.size
    merger = n // 4 * 2 * ((4 * v.size) ** 2 + 4 * v.size * 64)
    pairs = 4 * v.size * (work.patch_pairs + 2 * work.window_pairs)
    assert forward_flops(backbone.config, work).vision == linear + merger + pairs


def test_both_layouts_give_the_same_configuration():
    import transformers

    for changes in ({}, {"tie_word_embeddings": True}):
        flat = config(**changes)
        nested = transformers.Qwen2_5_VLConfig(**config(**changes)).to_dict()
        assert "hidden_size" not in nested
        assert Qwen25VLConfig.from_hf(nested) == Qwen25VLConfig.from_hf(flat)
        assert Qwen25VLConfig.from_hf(flat).tie_word_embeddings == bool(changes)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"vision_fullatt_block_indexes": [1, 3]}, ["fullatt_block_indexes names [3], but depth = 3"]),
        ({"vision_window_size": 60}, ["window_size = 60 must be a multiple of patch_size * spatial_merge_size = 28"]),
        ({"vision_out_hidden_size": 48}, ["out_hidden_size = 48 must equal hidden_size = 64"]),
        ({"vision_hidden_size": 36}, ["vision_config.hidden_size = 36 must be divisible by 4 * num_heads = 8"]),
        ({"vision_hidden_act": "gelu"}, ["hidden_act = 'gelu' is not implemented"]),
        ({"rope_scaling": None}, ["mrope_section is missing"]),
        ({"model_type": "qwen2_vl"}, ["model_type = 'qwen2_vl': expected 'qwen2_5_vl'"]),
        (
            {"vision_window_size": 60, "vision_fullatt_block_indexes": [-1, 9], "num_key_value_heads": 3},
            ["window_size = 60", "names [-1, 9]", "num_key_value_heads = 3"],
        ),
    ],
)
def test_what_cannot_be_used_is_said(changes, messages):
    with pytest.raises(ConfigError) as caught:
        Qwen25VLConfig.from_hf(config(**changes))
    assert all(message in str(caught.value) for message in messages), caught.value


# The published sizes (reference: the config.json of each): hidden, layers, heads, key heads, inner, vocabulary, tied,
# inner size of the tower; and the parameters of the whole model with its output head, in thousands of millions.
PUBLISHED = {
    "3B": ((2048, 36, 16, 2, 11008, 151936, True, 3420), 3.755),
    "7B": ((3584, 28, 28, 4, 18944, 152064, False, 3420), 8.292),
    "32B": ((5120, 64, 40, 8, 27648, 152064, False, 3456), 33.453),
    "72B": ((8192, 80, 64, 8, 29568, 152064, False, 3456), 73.411),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    (hidden, layers, heads, groups, inner, vocabulary, tied, tower), billions = PUBLISHED[name]
    found = config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        vision_depth=32,
        vision_hidden_size=1280,
        vision_num_heads=16,
        vision_intermediate_size=tower,
        vision_window_size=112,
        vision_fullatt_block_indexes=[7, 15, 23, 31],
        vision_out_hidden_size=hidden,
    )
    model = nnx.eval_shape(lambda: from_config(found, rngs=nnx.Rngs(0)))
    assert model.config.window == 8
    head = 0 if tied else vocabulary * hidden
    assert round((num_params(model) + head) / 1e9, 3) == billions
