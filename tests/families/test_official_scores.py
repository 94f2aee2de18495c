"""Checkpoints of the official code: its forward pass in torch, and `multitap import` + `multitap score`, agree."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from multitap_jax import cli
from multitap_jax.data.stream import Pair
from multitap_jax.scoring.importing import import_official
from multitap_jax.scoring.scorer import Scorer
from tests.families.checks import score_verb
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


@pytest.mark.parametrize("prompt, older", [("official-train", True), ("official-eval", False)])
def test_import_and_score_give_the_official_scores(official, tmp_path, prompt, older):
    recipe, model, base, whole = official
    renamed = {"rename": recipe.rename} if older else {}
    folder, out = sharded(whole, tmp_path / "shards", index=older, **renamed), tmp_path / "artefact"
    flags = (f"--checkpoint={folder}", f"--base={base}", f"--prompt={prompt}", f"--image_policy=square:{recipe.side}")
    assert cli.main(["import", *flags, f"--output={out}"]) == 0
    expected = recipe.scores(model, prompt)
    pairs = [Pair((image,), text) for image, text in zip(PICTURES, TEXTS, strict=True)]
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(score_verb(out, pairs, tmp_path), expected, atol=5e-6, rtol=0)


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
