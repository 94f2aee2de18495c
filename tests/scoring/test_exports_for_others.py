"""What docs/exporting.md shows, run as it stands there; a program without this package; a classifier for vLLM."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from multitap_jax import cli
from multitap_jax.data.processing import Contract
from multitap_jax.data.stream import Pair
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_heads, export_stablehlo, export_vllm
from multitap_jax.scoring.exports.vllm import classification_config
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.weights.hub import load_backbone
from tests.documentation import run_apart, snippet
from tests.families.common import picture
from tests.families.qwen2_vl import oracle
from tests.scoring.model_fixtures import OBJECTIVES
from tests.tiny_qwen2_vl import write_folder

HIDDEN = 64
TEXTS = ["a red ball", 'the "blue" box is far away', " \ta ball \n", "a red ball is near on your left"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_folder(folder, oracle().config)
    oracle().tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(oracle().preprocessor))
    return folder


def make(base: Path, folder: Path, mode: str) -> Path:
    rng = np.random.default_rng(0)
    head = RewardHead.from_arrays(rng.standard_normal(HIDDEN).astype(np.float32) * np.float32(0.3), np.float32(0.1))
    features, targets = rng.standard_normal((90, HIDDEN)), rng.standard_normal((90, 2))
    ridge = RidgeHead(alphas=[1.0]).fit(features, targets, objective_names=[o.name for o in OBJECTIVES])
    contract = Contract("official-train", mode, "square:56")
    model = RewardModel(load_backbone(base), head)
    return Artefact.save(folder, model, base=base, contract=contract, ridge=ridge, objectives=OBJECTIVES).folder


@pytest.fixture(scope="module")
def flat(base, tmp_path_factory) -> Path:
    return make(base, tmp_path_factory.mktemp("flat") / "artefact", "flat")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder, out = tmp_path_factory.mktemp("images"), []
    for number, size in enumerate(((150, 90), (60, 200), (150, 90), (56, 56))):
        picture(*size).save(folder / f"{number}.png")
        out.append(str(folder / f"{number}.png"))
    return out


@pytest.fixture(scope="module")
def expected(flat, images):
    return Scorer.from_pretrained(flat).score(images=images, texts=TEXTS)


@pytest.mark.parametrize("mode", ["flat", "mrope"])
def test_the_torch_lines_of_the_documentation(base, tmp_path, images, mode):
    pytest.importorskip("torch")
    folder = make(base, tmp_path / "artefact", mode)
    wanted = Scorer.from_pretrained(folder).score(images=images, texts=TEXTS)
    scope = {"folder": folder}
    exec(snippet("torch"), scope)
    assert sum(bool(line.strip()) for line in snippet("torch").splitlines()) <= 20
    for index, (image, text) in enumerate(zip(images, TEXTS, strict=True)):
        overall, objectives = scope["score"](image, text)
        np.testing.assert_allclose(float(overall), wanted.overall[index], atol=1e-5)
        np.testing.assert_allclose(objectives.numpy(), wanted.objectives[index], atol=1e-4)


def test_the_numpy_lines_of_the_documentation(flat, tmp_path, images, expected, monkeypatch):
    out = export_heads(flat, tmp_path / "heads")
    assert (out / "heads.safetensors").stat().st_mode & 0o777 == 0o644
    scope = {"h": Scorer.from_pretrained(flat).embed(images=images, texts=TEXTS).values}
    monkeypatch.chdir(tmp_path)
    exec(snippet("numpy"), scope)
    np.testing.assert_allclose(scope["overall"], expected.overall, atol=1e-6)
    np.testing.assert_allclose(scope["objectives"], expected.objectives, atol=1e-5)
    assert scope["names"] == [objective.name for objective in OBJECTIVES]


EPILOGUE = """
import numpy as np
found = {name: np.asarray(value) for name, value in outputs.items()}
pairs = json.load(open("pairs.json"))
rows = np.asarray(run(weights, batch_of(pairs))["overall"])[: len(pairs), 0]
np.savez("found.npz", record=np.asarray(inputs["record"]), rows=rows, **found)
"""


def test_a_fresh_process_runs_the_program_without_this_package(flat, tmp_path, images, expected):
    pairs = [Pair((image,), text) for image, text in zip(images, TEXTS, strict=True)]
    export_stablehlo(flat, tmp_path / "program", pairs)
    about = json.loads((tmp_path / "program" / "program.json").read_text())
    assert about["computation"] == {"dtype": "float32", "attention": "auto", "platforms": ["cpu"]}
    rows = min(about["inputs"]["tokens"]["shape"][0], about["inputs"]["patches"]["shape"][0])
    (tmp_path / "pairs.json").write_text(json.dumps(list(zip(images, TEXTS, strict=True))[:rows]))
    run_apart(snippet("stablehlo") + snippet("rows") + EPILOGUE, tmp_path)
    found = np.load(tmp_path / "found.npz")
    here = found["record"] >= 0
    order = found["record"][here]
    assert sorted(order) == [0, 1, 2, 3]
    np.testing.assert_allclose(found["overall"][here], expected.overall[order], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found["logits"][here], expected.logits[order], atol=1e-5, rtol=0)
    np.testing.assert_allclose(found["objectives"][here], expected.objectives[order], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(found["rows"], expected.overall[:rows], atol=1e-5, rtol=0)


def test_a_program_for_several_platforms_through_the_verb(flat, tmp_path, images, capsys):
    lines = [json.dumps({"id": str(i), "image": Path(images[i]).name, "text": TEXTS[i]}) for i in range(2)]
    (Path(images[0]).parent / "pairs.jsonl").write_text("\n".join(lines))
    command = ["export", f"--checkpoint={flat}", "--format=stablehlo", f"--output={tmp_path / 'out'}"]
    assert cli.main(command) == 1  # no --input
    command += [f"--input={Path(images[0]).parent / 'pairs.jsonl'}", "--dtype=bfloat16"]
    assert cli.main([*command, "--platforms=cpu,rocket"]) == 1
    assert "expected some of cpu, cuda, tpu" in capsys.readouterr().err
    assert cli.main([*command, "--platforms=cpu,cuda,tpu"]) == 0
    about = json.loads((tmp_path / "out" / "program.json").read_text())
    assert about["computation"] == {"dtype": "bfloat16", "attention": "dense", "platforms": ["cpu", "cuda", "tpu"]}


def test_a_classifier_for_vllm(flat, tmp_path, base):
    from transformers import AutoConfig

    with pytest.warns(ContractWarning, match=r"trained with flat positions.*\(mrope\)"):
        out = export_vllm(flat, tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForSequenceClassification"]
    read, original = AutoConfig.from_pretrained(out), AutoConfig.from_pretrained(base)
    # vLLM takes the labels from either; nothing else may have changed.
    assert read.num_labels == read.get_text_config().num_labels == 1
    plain = lambda text: {k: v for k, v in text.to_dict().items() if k not in ("id2label", "label2id", "architectures")}
    assert plain(read.get_text_config()) == plain(original.get_text_config())
    assert read.vision_config.to_dict() == original.vision_config.to_dict()
    tensors, ours = load_file(out / "model.safetensors"), load_file(flat / "model.safetensors")
    heads = load_file(flat / "heads.safetensors")
    np.testing.assert_array_equal(tensors.pop("score.weight"), heads["reward_head.weight"])
    np.testing.assert_array_equal(tensors.pop("score.bias"), heads["reward_head.bias"])
    assert {name: value.tobytes() for name, value in tensors.items()} == {n: v.tobytes() for n, v in ours.items()}
    about = json.loads((out / "multitap_vllm.json").read_text())
    assert about["prompt"].endswith("<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n")
    older = json.loads(about["without_score_bias"]["pooler_config"])
    assert older["logit_bias"] == pytest.approx(-float(heads["reward_head.bias"][0]))


def test_only_generation_architectures_become_classifiers():
    with pytest.raises(ArtefactError, match=r"architectures = \['Qwen2VLModel'\]"):
        classification_config({"architectures": ["Qwen2VLModel"], "model_type": "qwen2_vl"})
