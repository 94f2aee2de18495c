"""Checkpoints of the official code: its forward pass in torch, and `multitap import` + `multitap score`, agree."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.scorer import Scorer
from tests.families.official import PICTURES, RECIPES, TEXTS


@pytest.fixture(scope="module", params=RECIPES)
def official(request, tmp_path_factory):
    """A recipe, its torch model, its backbone's own folder, and its state in the official layout."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("official")
    recipe = RECIPES[request.param]
    return recipe, recipe.write(base, folder), base, folder


def sharded(source, folder, *, index: bool, rename=lambda name: name):
    """The same tensors in three shards."""
    tensors = {rename(name): value for name, value in load_file(source / "model.safetensors").items()}
    where = {}
    folder.mkdir()
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


@pytest.mark.parametrize("prompt, older", [("official-train", True), ("official-eval", False)])
def test_import_and_score_give_the_official_scores(official, tmp_path, prompt, older):
    recipe, model, base, whole = official
    renamed = {"rename": recipe.rename} if older else {}
    folder, out = sharded(whole, tmp_path / "shards", index=older, **renamed), tmp_path / "artefact"
    flags = (f"--checkpoint={folder}", f"--base={base}", f"--prompt={prompt}", f"--image_policy=square:{recipe.side}")
    assert run("import", *flags, f"--output={out}") == 0
    expected = recipe.scores(model, prompt)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(verb_scores(out, tmp_path), expected, atol=5e-6, rtol=0)


def test_positions_matter(tmp_path):
    """Those of the architecture give other scores, so the agreement above is no accident."""
    recipe, base, folder = RECIPES["qwen2_vl"], tmp_path / "base", tmp_path / "official"
    base.mkdir()
    folder.mkdir()
    model = recipe.write(base, folder)
    policy = f"square:{recipe.side}"
    again = import_official(folder, tmp_path / "mrope", base=base, position_mode="mrope", image_policy=policy)
    other = Scorer.from_pretrained(again.folder).score(images=list(PICTURES), texts=list(TEXTS)).overall
    assert np.abs(other - recipe.scores(model, "official-train")).max() > 1e-3
