"""Qwen3-VL against transformers, from pictures and texts to states, gradients and scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from multitap_jax.backbones import Execution
from multitap_jax.backbones.attention import blockwise
from multitap_jax.backbones.qwen3_vl import PositionTable, Qwen3VL, Qwen3VLConfig, last_positions
from multitap_jax.backbones.stack import collect_layers, keep_layers
from multitap_jax.config import ConfigError
from multitap_jax.data.chat import IMAGE, QWEN3_VL
from multitap_jax.data.stream import Pair
from multitap_jax.families import from_config, num_params, read_config
from multitap_jax.flops import Work, forward_flops
from multitap_jax.weights.hub import load_backbone
from tests.families import checks, qwen_checks
from tests.families.common import FLOAT32, QUICK, batches, check_parity, contract_of
from tests.families.qwen3_vl import POLICY, config, oracle
from tests.families.qwen_checks import PAIRS, SMALL, WIDE
from tests.tiny_qwen2_vl import block_major


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_vl")
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


layer_states = jax.jit(
    lambda model, batch: (
        model.vision.hidden_states(batch, FLOAT32),
        model.vision.features(batch, FLOAT32),
        model.hidden_states(batch, FLOAT32),
    ),
    compiler_options=QUICK,
)


def test_every_layer_equals_transformers(model):
    _, torch_model, folder = model
    pair = Pair((WIDE, SMALL), "a ball")
    run, _ = qwen_checks.runner(*model, pair, image_policy=POLICY)
    (batch,) = batches(folder, [pair], contract_of(folder, image_policy=POLICY))
    real, visual = batch.patch_segment > 0, torch_model.model.visual

    patches, (cells, deepstack), text = layer_states(load_backbone(folder), batch)
    embedded = qwen_checks.recorded(visual.blocks[:1], run, inputs=True)
    for mine, yours in zip(patches, [*embedded, *qwen_checks.recorded(visual.blocks, run)], strict=True):
        checks.assert_near(mine[real], yours)
    for mine, merger in zip((cells, *deepstack), (visual.merger, *visual.deepstack_merger_list), strict=True):
        checks.assert_near(mine[real[:, ::4]], qwen_checks.recorded([merger], run)[0])

    layers = torch_model.model.language_model.layers  # what DeepStack adds shows in the input of the layer that follows
    expected = [*qwen_checks.recorded(layers, run, inputs=True), qwen_checks.recorded(layers[-1:], run)[0]]
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


def test_kept_states_are_those_of_all():
    layers = nnx.eval_shape(lambda: from_config(config(), rngs=nnx.Rngs(0))).text.layers.mlp
    key = jax.random.key(0)
    layers = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype) * 0.1, layers)
    x = jax.random.normal(key, (1, 2, 64), jnp.float32)
    for loop in ("scan", "loop"):
        execution = Execution(layers=loop)
        states = collect_layers(layers, x, execution=execution)
        last, kept = keep_layers(layers, x, keep=(3, 0, 2), execution=execution)
        np.testing.assert_array_equal(last, states[-1])
        np.testing.assert_array_equal(kept, states[jnp.asarray((3, 0, 2))])
        assert keep_layers(layers, x, keep=(), execution=execution)[1].shape == (0, 1, 2, 64)


def test_positions_are_interpolated_as_torch_does():
    """Grids larger and smaller than the table and equal to it, two pictures a row, against torch's own resampling."""
    torch = pytest.importorskip("torch")
    numbers = Qwen3VLConfig.from_hf(config()).vision
    table = PositionTable(numbers, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    grids = [[(10, 4), (2, 2)], [(6, 6), (2, 4)]]
    position = jnp.asarray(np.stack([np.concatenate([block_major(*grid) for grid in row]) for row in grids]))
    segment = jnp.asarray(np.stack([np.repeat([1, 2], [r * c for r, c in row]) for row in grids]).astype(np.int32))
    last = last_positions(position, segment, 12)
    got = np.asarray(table(position, last))
    square = torch.from_numpy(np.array(table.table[...])).reshape(1, 6, 6, 32).permute(0, 3, 1, 2)
    for row, pictures in enumerate(grids):
        start = 0
        for number, grid in enumerate(pictures, start=1):
            whole = torch.nn.functional.interpolate(square, grid, mode="bilinear", align_corners=True)[0].numpy()
            where = np.asarray(position[row])[np.asarray(segment[row]) == number]
            count = grid[0] * grid[1]
            np.testing.assert_array_equal(last[row, start : start + count], np.tile(np.array(grid) - 1, (count, 1)))
            expected = whole[:, where[:, 0], where[:, 1]].T
            np.testing.assert_allclose(got[row, start : start + count], expected, atol=1e-6, rtol=0)
            start += count


def test_flops_count_every_merger():
    numbers = Qwen3VLConfig.from_hf(config())
    v, n = numbers.vision, 40
    linear = 4 * 2 * n * (4 * v.size**2 + 2 * v.size * v.intermediate_size) + 2 * n * 768 * v.size
    mergers = 3 * (n // 4) * 2 * ((4 * v.size) ** 2 + 4 * v.size * 64)
    assert forward_flops(numbers, Work(0, 0, n, 900, 0, 0, 0)).vision == linear + mergers + 4 * 4 * v.size * 900


def test_its_prompt_has_no_system_message():
    rendered = QWEN3_VL.render([("user", ["Describe."]), ("assistant", [IMAGE, "a ball"])])
    expected = (
        "<|im_start|>user\nDescribe.<|im_end|>\n<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>"
    )
    assert rendered == expected + "a ball<|im_end|>\n"


def test_a_folder_without_statistics_means_one_half_and_its_own_policy(model):
    family, numbers = read_config(model[2])
    assert family.model is Qwen3VL
    assert numbers.vision.pixels.mean == numbers.vision.pixels.std == (0.5, 0.5, 0.5)
    contract = contract_of(model[2])
    assert contract.image_policy == "square:576"
    (batch,) = batches(model[2], PAIRS[:1], contract)
    assert (int((batch.patch_segment > 0).sum()), batch.patches.shape[-1]) == (36 * 36, 3 * 16 * 16)


def test_both_layouts_give_the_same_configuration():
    import transformers

    for changes in ({}, {"tie_word_embeddings": True}):
        hub = config(**changes)
        written = transformers.Qwen3VLConfig(**config(**changes)).to_dict()
        assert "rope_scaling" not in written["text_config"]
        assert Qwen3VLConfig.from_hf(written) == Qwen3VLConfig.from_hf(hub)
        assert Qwen3VLConfig.from_hf(hub).tie_word_embeddings == bool(changes)
    assert Qwen3VLConfig.from_hf(hub).text.head_dim == 24
    plain = {"rope_type": "default", "mrope_section": [4, 4, 4]}
    assert Qwen3VLConfig.from_hf(config(text_rope_scaling=plain)).text.rope.interleaved


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"vision_deepstack_visual_indexes": [1, 4]}, ["deepstack_visual_indexes names [4], but depth = 4"]),
        ({"vision_deepstack_visual_indexes": [2, 0]}, ["deepstack_visual_indexes = [2, 0] must be in ascending order"]),
        ({"vision_deepstack_visual_indexes": []}, ["deepstack_visual_indexes is empty"]),
        ({"vision_deepstack_visual_indexes": [0, 1, 2, 3]}, ["names 4 layers, but the decoder has 3"]),
        ({"vision_num_position_embeddings": 35}, ["num_position_embeddings = 35 must be a square"]),
        ({"vision_out_hidden_size": 48}, ["out_hidden_size = 48 must equal hidden_size = 64"]),
        ({"vision_hidden_size": 36}, ["vision_config.hidden_size = 36 must be divisible by 4 * num_heads = 8"]),
        ({"vision_hidden_act": "gelu"}, ["hidden_act = 'gelu' is not implemented"]),
        ({"text_attention_bias": True}, ["attention_bias = True is not implemented"]),
        ({"text_head_dim": 32}, ["mrope_section = [4, 4, 4] must add up to half the head size 32"]),
        ({"text_rope_scaling": {"mrope_section": [2, 5, 5]}}, ["more than every third of the 12 frequencies"]),
        ({"text_rope_scaling": {"mrope_interleaved": False}}, ["mrope_interleaved = false is not implemented"]),
        ({"model_type": "qwen3_vl_moe"}, ["model_type = 'qwen3_vl_moe': expected 'qwen3_vl'"]),
        (
            {
                "vision_num_position_embeddings": 7,
                "vision_deepstack_visual_indexes": [9],
                "text_num_key_value_heads": 3,
            },
            ["num_position_embeddings = 7", "names [9]", "num_key_value_heads = 3"],
        ),
    ],
)
def test_what_cannot_be_used_is_said(changes, messages):
    with pytest.raises(ConfigError) as caught:
        Qwen3VLConfig.from_hf(config(**changes))
    assert all(message in str(caught.value) for message in messages), caught.value


# hidden, layers, heads, key heads, inner, tied; layers, size, inner size and DeepStack of the tower.
PUBLISHED = {
    "4B": ((2560, 36, 32, 8, 9728, True), (24, 1024, 4096, [5, 11, 17])),
    "8B": ((4096, 36, 32, 8, 12288, False), (27, 1152, 4304, [8, 16, 24])),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_parameters_of_transformers(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    (hidden, layers, heads, groups, inner, tied), (depth, size, tower, deepstack) = PUBLISHED[name]
    changes = {
        "text_hidden_size": hidden,
        "text_num_hidden_layers": layers,
        "text_num_attention_heads": heads,
        "text_num_key_value_heads": groups,
        "text_intermediate_size": inner,
        "text_head_dim": 128,
        "text_vocab_size": 151936,
        "text_rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "tie_word_embeddings": tied,
        "vision_depth": depth,
        "vision_hidden_size": size,
        "vision_num_heads": 16,
        "vision_intermediate_size": tower,
        "vision_num_position_embeddings": 2304,
        "vision_deepstack_visual_indexes": deepstack,
        "vision_out_hidden_size": hidden,
    }
    model = nnx.eval_shape(lambda: from_config(config(**changes), rngs=nnx.Rngs(0)))
    with torch.device("meta"):
        theirs = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(**config(**changes)))
    assert num_params(model) == sum(weight.numel() for weight in theirs.parameters())
