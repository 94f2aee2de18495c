"""InternLM-XComposer2.5's folder: weights in and out, code that nobody runs, the official layout, scores, bad input."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.backbones import Execution
from multitap_jax.backbones.xcomposer import OFFICIAL, XComposerConfig
from multitap_jax.config import ConfigError
from multitap_jax.data.decode import ImageError
from multitap_jax.data.hd import HdLayout
from multitap_jax.data.processing import Processing
from multitap_jax.data.stream import Pair, StreamPacker
from multitap_jax.evaluation.baselines import Judge
from multitap_jax.evaluation.baselines.prompts import VERDICT, JudgePrompter, fill
from multitap_jax.families import UnsupportedModelError, from_config, num_params, read_config
from multitap_jax.flops import count_work, forward_flops
from multitap_jax.naming import by_name
from multitap_jax.planning.published import PUBLISHED, read_model
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_official, export_vllm
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.scoring.saving import companion_files
from multitap_jax.weights import xcomposer
from multitap_jax.weights.files import read_tensors
from multitap_jax.weights.hub import export_tensors, load_backbone
from multitap_jax.weights.mapping import WeightError
from tests.families.checks import score_verb
from tests.families.common import QUICK, batches, contract_of, direction, random_weight
from tests.families.internlm2 import (
    CODE_FILES,
    GOLDENS,
    HD,
    PAIRS,
    RAW,
    READINGS,
    SIDE,
    WIDE,
    oracle,
    other_tensors,
    tokenizer,
    vocabulary,
)
from tests.families.llava_checks import check_adapters
from tests.families.xcomposer_reference import Reference

FOUND = json.loads(GOLDENS.read_text(encoding="utf-8"))
WITH_IMAGES = [pair for pair in PAIRS if pair.images]
HEAD, BIAS = direction(64) * np.float32(0.3), 2.6  # such that scores are neither near 0 nor near 1


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return oracle().write_published(tmp_path_factory.mktemp("published"))


def official(folder, base, *, prefix="backbone_model.", config=None):
    """A checkpoint of the official code: the whole state of its model, in one file; its config.json names no model."""
    state = {prefix + name: tensor for name, tensor in read_tensors(base).items()}
    state["reward_head.weight"] = HEAD[None]
    state["reward_head.bias"] = np.full(1, BIAS, np.float32)
    save_file(state, folder / "model.safetensors")
    named = {"architectures": ["VLMRewardModel"], "hidden_size": 64, "model_type": ""}
    (folder / "config.json").write_text(json.dumps(named if config is None else config))
    return state


@pytest.fixture
def checkpoint(published, tmp_path):
    (tmp_path / "official").mkdir()
    official(tmp_path / "official", published)
    return tmp_path / "official"


def reference_scores(name, pairs, applied, raw, folder):
    """float[N]: of the goldens' prompts and the reference's states, with the head of `official`."""
    variant = READINGS[name][1].get("prompt", "official-train")
    model, weight, out = Reference(folder, applied=applied, raw=raw), HEAD, []
    for ids, pair in zip(FOUND["ids"][variant], PAIRS, strict=True):
        if pair in pairs:
            shown = [image.resize((SIDE, SIDE)) for image in pair.images]
            out.append(1 / (1 + np.exp(-(weight @ model(ids, shown)[-1][-1] + BIAS))))
    return np.asarray(out)


def test_weights_come_and_go_byte_for_byte(published, tmp_path):
    """Under the hub's names and those of transformers 5, whose CLIP has no `vision_model.`."""
    expected = read_tensors(published)
    exported = dict(export_tensors(load_backbone(published)))
    assert expected.keys() - exported.keys() == other_tensors(oracle().config).keys()
    for key, value in exported.items():
        assert value.tobytes() == np.ascontiguousarray(expected[key]).tobytes(), key
    oracle().write_without_weights(tmp_path)
    today = {key.replace("vit.vision_tower.vision_model.", "vit.vision_tower."): x for key, x in expected.items()}
    assert today.keys() != expected.keys()
    save_file(today, tmp_path / "model.safetensors")
    again = dict(export_tensors(load_backbone(tmp_path)))
    assert all(again[key].tobytes() == value.tobytes() for key, value in exported.items())


def test_rules_are_one_to_one_and_name_every_parameter(published):
    _, config = read_config(published)
    rules = xcomposer.table(config).rules
    assert len({rule.path for rule in rules}) == len({rule.key for rule in rules}) == len(rules)
    assert {rule.path for rule in rules} == by_name(load_backbone(published)).keys()


def test_the_fused_projection_is_queries_key_and_value_group_by_group(published):
    """Columns of the parameter, rows of the tensor: (group, query or key or value, dimension)."""
    tensor = read_tensors(published)["model.layers.0.attention.wqkv.weight"]
    kernel = np.asarray(load_backbone(published).text.layers.attention.qkv_proj.kernel)[0]
    np.testing.assert_array_equal(kernel.T.reshape(2, 4, 16, 64)[1, 2], tensor[6 * 16 : 7 * 16])


def test_code_in_the_folder_is_never_imported(published, checkpoint, tmp_path):
    """Each file would raise; loading, importing and scoring run none, take none along and leave no module behind."""
    assert all((published / f"{name}.py").is_file() for name in CODE_FILES)
    with pytest.raises(AssertionError, match="remote code was run"):
        exec((published / f"{CODE_FILES[0]}.py").read_text(), {})
    before = set(sys.modules)
    artefact = import_official(checkpoint, tmp_path / "artefact", base=published)
    Processing.from_folder(artefact.folder, artefact.manifest.contract)
    load_backbone(published)
    assert not [name for name in set(sys.modules) - before if any(code in name for code in CODE_FILES)]
    assert {path.name for path in companion_files(published)} == {
        "tokenizer.model",
        "tokenizer_config.json",
        "added_tokens.json",
    }
    assert not list(artefact.folder.glob("*.py"))


def test_official_weights_score_as_the_official_code(published, checkpoint, tmp_path):
    """`multitap import`, `multitap score` on the published layout: the official reading, against the reference."""
    flags = (f"--checkpoint={checkpoint}", f"--base={published}", f"--image_policy=square:{SIDE}")
    command = ["import", *flags, "--prompt=official-stage2", f"--output={tmp_path / 'artefact'}"]
    assert cli.main(command) == 0
    config = json.loads((tmp_path / "artefact" / "config.json").read_text())
    assert {name: config[name] for name in OFFICIAL} == OFFICIAL == RAW
    expected = reference_scores("official", WITH_IMAGES, False, True, checkpoint_weights(published, tmp_path))
    assert np.ptp(expected) > 0.05
    got = score_verb(tmp_path / "artefact", WITH_IMAGES, tmp_path)
    np.testing.assert_allclose(got, expected, atol=5e-6, rtol=0)


def checkpoint_weights(published, tmp_path):
    """The base's tensors in one file, as the reference reads them."""
    out = tmp_path / "whole"
    out.mkdir()
    save_file(read_tensors(published), out / "model.safetensors")
    (out / "config.json").write_text((published / "config.json").read_text())
    return out


def test_the_official_layout_and_back(published, checkpoint, tmp_path):
    """Every byte, also of what no score needs; and another reading is another score, which the export says."""
    artefact = import_official(checkpoint, tmp_path / "artefact", base=published)
    ours, theirs = read_tensors(artefact.folder), read_tensors(published)
    assert {key: value.tobytes() for key, value in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    assert artefact.manifest.contract.image_policy == "square:560"
    out = export_official(artefact.folder, tmp_path / "again")
    found, expected = load_file(out / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert {key: value.tobytes() for key, value in found.items()} == {k: v.tobytes() for k, v in expected.items()}
    back = import_official(out, tmp_path / "back")
    assert back.model_hash == artefact.model_hash
    assert (back.folder / "config.json").read_text() == (artefact.folder / "config.json").read_text()


def test_weights_of_the_models_own_reading_keep_it(published, tmp_path):
    """What was trained with additions and normalised pixels is exported with a warning, and comes back as it was."""
    from multitap_jax.reward import RewardHead, RewardModel

    contract = contract_of(published, image_policy="square:560")
    model = RewardModel(load_backbone(published), RewardHead.from_arrays(direction(64), np.float32(0)))
    artefact = Artefact.save(tmp_path / "artefact", model, base=published, contract=contract)
    with pytest.warns(ContractWarning, match=r"multitap_partial_lora by default \(official: off\)"):
        out = export_official(artefact.folder, tmp_path / "official")
    back = import_official(out, tmp_path / "back")
    assert not OFFICIAL.keys() & json.loads((back.folder / "config.json").read_text()).keys()


def test_vllm_takes_it_not(published, checkpoint, tmp_path):
    artefact = import_official(checkpoint, tmp_path / "artefact", base=published)
    with pytest.raises(ArtefactError, match=r"InternLMXComposer2ForCausalLM.*expected one \.\.\.ForConditionalGen"):
        export_vllm(artefact.folder, tmp_path / "vllm")


def test_what_is_wrong_with_the_weights_is_listed(published, tmp_path):
    tensors = read_tensors(published)
    del tensors["model.layers.1.attention.wqkv.Plora_A.weight"]
    tensors["plora_sub_GN"] = tensors["plora_sub_GN"].reshape(1, -1)
    tensors["model.layers.0.feed_forward.w1.lora_other_A.weight"] = np.zeros((4, 64), np.float32)
    oracle().write_without_weights(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError) as caught:
        load_backbone(tmp_path)
    for part in (
        "3 tensors do not fit the model",
        "missing: model.layers.1.attention.wqkv.Plora_A.weight [8, 64]",
        "wrong shape: plora_sub_GN [1, 128] float32, expected [1, 1, 1, 128]",
        "unknown: model.layers.0.feed_forward.w1.lora_other_A.weight",
    ):
        assert part in str(caught.value)


def test_pickles_beside_code_are_no_weights(tmp_path):
    """The published folder's main branch has no safetensors."""
    oracle().write_without_weights(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(WeightError, match="pickles, which run code when they are opened"):
        load_backbone(tmp_path)


WRONG = {
    r"architectures = \['InternLM2ForCausalLM'\]": {"architectures": ["InternLM2ForCausalLM"], "auto_map": None},
    "architectures = None is not implemented": {"architectures": None, "auto_map": None},
    r"bias = true \(or absent\)": {"bias": True},
    "rope type 'yarn' is not implemented": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "rope_scaling of type 'linear' lacks factor": {"rope_scaling": {"type": "linear"}},
    "max_position_embeddings = '4096' must be": {"max_position_embeddings": "4096"},
    "multitap_pixels = 'bright'.*'normalised' or 'raw'": {"multitap_pixels": "bright"},
    "multitap_partial_lora = 'on'.*'image' or 'off'": {"multitap_partial_lora": "on"},
    "multitap_plora_rank = 0 must be a positive": {"multitap_plora_rank": 0},
    "3 patches a side of 14 pixels are not a multiple of 2": {"vision_config": {"image_size": 42}},
    "vision_config.model_type = 'siglip'": {"vision_config": {"model_type": "siglip"}},
    "num_attention_heads = 4 must be divisible by num_key_value_heads = 3": {"num_key_value_heads": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_not_implemented_is_named(message):
    with pytest.raises(ConfigError, match=message):
        XComposerConfig.from_hf(oracle(**WRONG[message]).config)


def test_its_kin_are_refused():
    with pytest.raises(UnsupportedModelError, match="'internlmxcomposer2' is not supported; supported: .*internlm2"):
        from_config({**oracle().config, "model_type": "internlmxcomposer2"}, rngs=nnx.Rngs(0))


def test_a_configuration_that_came_through_the_official_code_is_known_by_its_auto_map():
    config = XComposerConfig.from_hf(oracle(architectures=["VLMRewardModel"]).config)
    assert config == XComposerConfig.from_hf(oracle().config)


def test_tokenizer_and_configuration_must_belong_together(tmp_path):
    oracle(image_token_id=5).write_without_weights(tmp_path)
    with pytest.raises(ValueError, match=f"image token has id {vocabulary() - 3}, config.json says 5"):
        Processing.from_folder(tmp_path, contract_of(tmp_path))


def test_pairs_longer_than_the_positions_reach_are_refused(tmp_path):
    oracle(max_position_embeddings=100).write_without_weights(tmp_path)
    processing = Processing.from_folder(tmp_path, contract_of(tmp_path))
    parts = (processing.prompter, processing.reader, processing.vision)
    with pytest.raises(ValueError, match="max_length = 101: beyond max_position_embeddings = 100(.|\n)*choose 100 or"):
        StreamPacker(*parts, hidden=64, max_length=101)
    window = StreamPacker(*parts, hidden=64, max_length=100).window([Pair((WIDE,), "a " * 90)])
    assert "of 100" in window.errors[0]


@pytest.mark.parametrize("policy", ["tiles:4", "native:784:7840", "crop:560"])
def test_a_policy_that_the_tower_cannot_take_says_which_it_can(policy):
    with pytest.raises(ImageError, match="pictures are square or hd"):
        HdLayout(policy, 14, 560, 2)


def test_verdicts_are_the_references_likeliest_tokens(published, tmp_path):
    """Greedy, token by token, each by a whole forward pass of the reference; images and new tokens in one row."""
    weights = checkpoint_weights(published, tmp_path)
    judge = Judge.from_pretrained(published, image_policy=f"square:{SIDE}")
    assert judge.stop == (2, vocabulary() - 2)
    reference, head = Reference(weights), read_tensors(published)["output.weight"]
    prompter = JudgePrompter(tokenizer(), read_config(published)[0].chat)
    got = judge.verdicts(images=[WIDE, WIDE], texts=["a red ball", "a box"], max_new_tokens=3)
    assert got.errors == [None, None]
    for index, text in enumerate(("a red ball", "a box")):
        (prompt,) = prompter.encode([fill(VERDICT, text, None)], [None], [1])
        ids = [*prompt.prefix.tolist(), *prompt.text.tolist()]
        written = []
        while len(written) < 3:
            state = reference([*ids, *written], [WIDE.resize((SIDE, SIDE))])[-1][-1]
            written.append(int(np.argmax(head @ state)))
            if written[-1] in judge.stop:
                break
        written = [token for token in written if token not in judge.stop]
        assert (got.texts[index], got.n_written[index]) == (prompter.decode(written), len(written))


def test_adapters(published):
    targets = ("text.layers.attention.qkv_proj", "text.layers.mlp.up_proj", "vision.projector.fc1")
    check_adapters(published, PAIRS[:2], contract_of(published, image_policy=HD), targets)


@pytest.mark.parametrize("applied", [True, False])
def test_flops_are_the_compilers(applied, tmp_path):
    """XLA's own count, products only being a lower bound of it; one view a picture, dense attention."""
    wide = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "multitap_plora_rank": 32}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    entries = {} if applied else {"multitap_partial_lora": "off"}
    changed = oracle(**wide, vision_config=vision, **entries)
    changed.write_without_weights(tmp_path)
    (batch,) = batches(tmp_path, [Pair((WIDE,), f"a ball {number}") for number in range(8)], contract_of(tmp_path))
    backbone = nnx.eval_shape(lambda: from_config(changed.config, rngs=nnx.Rngs(0)))
    rows, length = batch.tokens.shape
    patches, _ = backbone.config.block
    whole = {"tokens": rows * length, "token_pairs": rows * length**2, "patches": batch.patches[:, :, 0].size}
    whole |= {"pooled": batch.pool.size, "pooled_pairs": batch.pool.size * length}
    # Additions are computed for all tokens, and those of text are left out of the sum.
    work = count_work(batch)._replace(**whole, image_tokens=rows * length)
    ours = forward_flops(backbone.config, work).total
    execution = Execution(layers="loop", attention="dense")
    found = jax.jit(lambda m, b: m(b, execution)).lower(backbone, batch).compile(compiler_options=QUICK)
    assert work.patches % patches == 0
    assert 1.0 <= found.cost_analysis()["flops"] / ours < 1.1


def test_the_published_size():
    """8.3 billion parameters that a score needs; with the additions for other uses, the 22.19 GB of the files."""
    family, config = read_model("internlm-xcomposer2d5-7b")
    model = nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0)))
    text, ranks = config.text, 256 + 256 + 512
    fused = text.hidden_size + 2 * text.num_kv_heads * text.head_dim
    ends = (text.hidden_size + fused) + 2 * text.hidden_size + 3 * (text.hidden_size + text.intermediate_size)
    others = text.num_layers * ranks * ends + text.vocab_size * text.hidden_size + 2 * config.vision.size
    assert num_params(model) == 8_300_752_896
    assert round(2 * (num_params(model) + others) / 1e9, 2) == 22.19
    assert (config.block, config.image_token_id, config.text.rope.limit) == ((1600, 402), 92541, 24576)
    assert config.partial.rank == config.partial.alpha == 256


def test_what_an_empty_file_means():
    """The published configuration class, whose defaults are those of an InternLM of another size."""
    named = {"model_type": "internlm2", "architectures": PUBLISHED["internlm-xcomposer2d5-7b"]["architectures"]}
    config = XComposerConfig.from_hf({**named, "bias": False})
    assert (config.text.vocab_size, config.text.hidden_size, config.text.intermediate_size) == (103168, 4096, 11008)
    assert (config.text.num_layers, config.text.num_heads, config.text.num_kv_heads) == (32, 32, 32)
    assert (config.text.rms_norm_eps, config.text.rope.theta, config.text.rope.limit) == (1e-6, 10000.0, None)
    assert (config.vision.num_layers, config.vision.size, config.vision.image_size) == (24, 1024, 560)
    assert config.applied
    assert config.vision.pixels.mean[0] == 0.48145466


def test_the_other_tensors_are_random_and_not_zero():
    """So that a reader who took one of them for another would be seen."""
    assert all(np.abs(x).max() > 0 for x in other_tensors(oracle().config).values())
    assert np.abs(random_weight("plora_sub_GN", (1, 1, 1, 128), 0)).max() > 1
