"""Checkpoints of the official code: its forward pass, written here in torch, and `multitap import` + `score` agree.

What the official code does (kaist-cvml/MULTI-TAP on transformers 4.46.1; read, not copied): pairs padded on the left to
a fixed length, `hidden_states[-1]` at the last position, nn.Linear and a sigmoid; positions that count the padded row
on all three axes; pictures squeezed to a square by PIL.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.data.stream import Pair
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import ContractWarning, export_official
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.manifest import ArtefactError
from multitap_jax.scoring.scorer import Scorer
from tests.families.common import conversation, picture
from tests.families.qwen2_vl import inputs, oracle

torch = pytest.importorskip("torch")
SIDE, PADDED, HIDDEN = 56, 64, 64
TEXTS = ("a red ball", "the blue box is far away on the right", 'a "red" ball is near on your left')
PICTURES = (picture(150, 90), picture(60, 200), picture(150, 90))


class OfficialRewardModel(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone_model = backbone
        self.reward_head = torch.nn.Linear(HIDDEN, 1)

    def forward(self, **batch):
        hidden = self.backbone_model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return torch.sigmoid(self.reward_head(hidden[:, -1, :]).squeeze(-1))


def official_scores(model, prompt: str) -> np.ndarray:
    """Scores of the pairs, one a forward, as the official evaluation has it."""
    tokenizer, out = oracle().tokenizer, []
    for image, text in zip(PICTURES, TEXTS, strict=True):
        rendered = tokenizer.apply_chat_template(conversation(Pair((image,), text), prompt), tokenize=False)
        found = dict(inputs(tokenizer, rendered, [image.resize((SIDE, SIDE))]))
        left = PADDED - found["input_ids"].shape[1]
        assert left > 0
        for name, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0), ("mm_token_type_ids", 0)):
            found[name] = np.pad(found[name], ((0, 0), (left, 0)), constant_values=fill)
        found["position_ids"] = np.tile(np.arange(PADDED), (3, 1, 1))
        with torch.no_grad():
            out.append(model(**{name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}).numpy()[0])
    return np.asarray(out)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The torch model, its backbone's own folder, and its state as one file without config.json or tokenizer."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("official")
    model = OfficialRewardModel(oracle().write(base)).eval()
    with torch.no_grad():
        noise = np.random.default_rng(4).standard_normal((1, HIDDEN)).astype(np.float32)
        model.reward_head.weight.copy_(torch.from_numpy(noise * np.float32(0.3)))
        model.reward_head.bias.fill_(0.25)
    state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    state["backbone_model.lm_head.weight"] += np.float32(1)  # its own, not the base's
    save_file(state, folder / "model.safetensors")
    return model, base, folder


def hub_name(name: str) -> str:
    """The spelling of transformers 4.46."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def sharded(source, folder, *, index: bool, rename=lambda name: name):
    """The same tensors in three shards."""
    tensors = {rename(name): value for name, value in load_file(source / "model.safetensors").items()}
    where = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def write_pairs(folder):
    lines = []
    for number, (image, text) in enumerate(zip(PICTURES, TEXTS, strict=True)):
        image.save(folder / f"{number}.png")
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "text": text}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


def verb_scores(artefact, folder) -> np.ndarray:
    out = folder / "scores.jsonl"
    assert run("score", f"--checkpoint={artefact}", f"--input={write_pairs(folder)}", f"--output={out}") == 0
    return np.asarray([json.loads(line)["score"] for line in out.read_text().splitlines()])


@pytest.mark.parametrize(
    "prompt, index, rename", [("official-train", True, hub_name), ("official-eval", False, lambda name: name)]
)
def test_import_and_score_give_the_official_scores(official, tmp_path, prompt, index, rename):
    model, base, whole = official
    (tmp_path / "shards").mkdir()
    folder, out = sharded(whole, tmp_path / "shards", index=index, rename=rename), tmp_path / "artefact"
    flags = (f"--checkpoint={folder}", f"--base={base}", f"--prompt={prompt}", f"--image_policy=square:{SIDE}")
    assert run("import", *flags, f"--output={out}") == 0
    expected = official_scores(model, prompt)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(verb_scores(out, tmp_path), expected, atol=5e-6, rtol=0)
    # Positions matter: the architecture's own give other scores, so the agreement above is no accident.
    again = import_official(folder, tmp_path / "mrope", base=base, prompt=prompt, position_mode="mrope",
                            image_policy=f"square:{SIDE}")  # fmt: skip
    other = Scorer.from_pretrained(again.folder).score(images=list(PICTURES), texts=list(TEXTS)).overall
    assert np.abs(other - expected).max() > 1e-3


def test_an_import_holds_the_checkpoints_own_tensors(official, tmp_path):
    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    given = {hub_name(name.removeprefix("backbone_model.")): value for name, value in
             load_file(folder / "model.safetensors").items() if name.startswith("backbone_model.")}  # fmt: skip
    found = load_file(artefact.folder / "model.safetensors")
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].tobytes() == value.tobytes(), name
    contract = artefact.manifest.contract
    assert (contract.prompt, contract.position_mode, contract.image_policy) == ("official-train", "flat", "square:560")
    assert (artefact.folder / "tokenizer.json").is_file()


def test_transformers_opens_what_was_imported(official, tmp_path):
    import transformers

    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        artefact.folder, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = load_file(folder / "model.safetensors")["backbone_model.lm_head.weight"]
    np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), expected)


def test_export_and_import_give_the_same_scores_whatever_the_contract(official, tmp_path):
    _, base, folder = official
    chosen = {"prompt": "official-eval", "position_mode": "mrope", "image_policy": "native:3136:12544"}
    first = import_official(folder, tmp_path / "first", base=base, **chosen)
    with pytest.warns(ContractWarning, match=r"position_mode mrope \(official: flat\)"):
        out = export_official(first.folder, tmp_path / "official", max_shard_bytes=200_000)
    back = import_official(out, tmp_path / "back")
    assert back.manifest.contract == first.manifest.contract
    assert back.model_hash == first.model_hash
    pairs = {"images": list(PICTURES), "texts": list(TEXTS)}
    scores = [Scorer.from_pretrained(artefact.folder).score(**pairs).overall for artefact in (first, back)]
    np.testing.assert_array_equal(*scores)
    path = out / "multitap_contract.json"
    path.write_text(path.read_text().replace("mrope", "flat"))
    with pytest.raises(ArtefactError, match=r"multitap_contract\.json: the contract does not match its hash"):
        import_official(out, tmp_path / "edited")


def test_an_export_of_the_official_contract_warns_of_nothing(official, tmp_path, capsys):
    _, base, folder = official
    artefact = import_official(folder, tmp_path / "artefact", base=base).folder
    out = tmp_path / "out"
    assert run("export", f"--checkpoint={artefact}", "--format=official", f"--output={out}") == 0
    assert "warning" not in capsys.readouterr().err


def test_everything_that_is_wrong_is_said_at_once(official, tmp_path):
    _, base, folder = official
    tensors = load_file(folder / "model.safetensors")
    del tensors["reward_head.bias"], tensors["backbone_model.model.visual.merger.mlp.0.bias"]
    tensors["reward_head.weight"] = np.zeros((2, 64), np.float32)
    tensors["backbone_model.model.language_model.norm.weight"] = np.zeros(63, np.float32)
    tensors["value_head.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    with pytest.raises(ArtefactError) as caught:
        import_official(tmp_path, tmp_path / "out")
    for problem in (
        "reward_head.weight: [2, 64], expected [1, 64]",
        "reward_head.bias: missing, expected [1]",
        "unknown: value_head.weight",
        "missing: backbone_model.visual.merger.mlp.0.bias [128]",
        "wrong shape: backbone_model.model.language_model.norm.weight [63] float32, expected [64]",
        "has no tokenizer: give the backbone's own folder, --base=FOLDER",
    ):
        assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_imported(official, tmp_path):
    _, base, folder = official
    with pytest.raises(ArtefactError, match=r"without a reward head.*multitap train --config"):
        import_official(base, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"has no config\.json; give the backbone's own folder: --base=FOLDER"):
        import_official(folder, tmp_path / "out")
    artefact = import_official(folder, tmp_path / "artefact", base=base)
    with pytest.raises(ArtefactError, match="is an artefact already"):
        import_official(artefact.folder, tmp_path / "out")
    with pytest.raises(ArtefactError, match=r"multitap import --checkpoint="):
        Artefact.open(export_official(artefact.folder, tmp_path / "official"))


def test_a_tokenizer_of_another_model_leaves_nothing_behind(official, tmp_path):
    _, base, folder = official
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "image_token_id": 3}))
    (tmp_path / "in" / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match="the two files belong to different models"):
        import_official(tmp_path / "in", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
