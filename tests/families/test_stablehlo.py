"""Every family as a StableHLO program: a process without this package gets the scorer's numbers from it."""

import importlib
import json

import numpy as np

from multitap_jax.families import FAMILIES
from multitap_jax.reward import RewardHead, RewardModel
from multitap_jax.scoring.artefact import Artefact
from multitap_jax.scoring.exports import export_stablehlo
from multitap_jax.scoring.scorer import Scorer
from multitap_jax.stage2.head import RidgeHead
from multitap_jax.weights.hub import load_backbone
from tests.documentation import run_apart, snippet
from tests.families.common import contract_of, direction
from tests.scoring.model_fixtures import OBJECTIVES

EPILOGUE = """
import numpy as np
np.savez("found.npz", record=np.asarray(inputs["record"]), **{name: np.asarray(x) for name, x in outputs.items()})
"""
# One process for all of them: it takes longer to start than to run a tiny program.
EACH = """
import os
for family in {families}:
    os.chdir(family)
    exec({code!r}, {{}})
    os.chdir("..")
"""


def case_of(family):
    return importlib.import_module(f"tests.families.{family}").cases()[0]


def exported(family, folder):
    """An artefact of the family's tiny model with random heads, and its program of all pairs of the parity test."""
    case, base = case_of(family), folder / "base"
    base.mkdir(parents=True)
    case.oracle.write_without_torch(base)
    rng, hidden = np.random.default_rng(0), 64
    head = RewardHead.from_arrays(direction(hidden) * np.float32(0.1), np.float32(0.1))
    features, targets = rng.standard_normal((90, hidden)), rng.standard_normal((90, 2))
    ridge = RidgeHead(alphas=[1.0]).fit(features, targets, objective_names=[o.name for o in OBJECTIVES])
    contract, model = contract_of(base, **case.chosen), RewardModel(load_backbone(base), head)
    options = {"base": base, "contract": contract, "ridge": ridge, "objectives": OBJECTIVES}
    artefact = Artefact.save(folder / "artefact", model, **options)
    export_stablehlo(artefact.folder, folder / "program", case.pairs)


def test_programs_give_the_scorers_numbers_and_say_what_they_take(tmp_path):
    for family in FAMILIES:
        exported(family, tmp_path / family)
    code = snippet("stablehlo") + EPILOGUE
    run_apart(EACH.format(families=list(FAMILIES), code=code), tmp_path)
    for family in FAMILIES:
        check_numbers(family, tmp_path / family)
        check_descriptions(family, tmp_path / family)


def check_numbers(family, folder):
    case, found = case_of(family), np.load(folder / "found.npz")
    columns = zip(*((list(pair.images), pair.text, pair.request) for pair in case.pairs), strict=True)
    arguments = dict(zip(("images", "texts", "requests"), map(list, columns), strict=True))
    expected = Scorer.from_pretrained(folder / "artefact").score(**arguments)
    here = found["record"] >= 0
    order = found["record"][here]
    assert sorted(order) == list(range(len(case.pairs))), family
    assert np.ptp(expected.logits) > 0.2, family
    for name in ("overall", "logits"):
        np.testing.assert_allclose(found[name][here], getattr(expected, name)[order], 0, 1e-5, err_msg=family)
    np.testing.assert_allclose(found["objectives"][here], expected.objectives[order], 1e-5, 1e-5, err_msg=family)


def check_descriptions(family, folder):
    inputs = json.loads((folder / "program" / "program.json").read_text())["inputs"]
    apart, mixed, tiled = family == "mllama", family == "llava_onevision", family == "internlm2"
    place, numbers = inputs["patch_position"]["meaning"], inputs["patch_position"]["shape"][-1]
    assert numbers == (6 if mixed else 4 if tiled else 2), family
    assert ("multiples of 2^-24" in place) == mixed, family
    assert place.startswith("(row, column)") == (not mixed and not tiled), family
    assert ("tiles across" in place) == tiled, family
    assert ("canvas of tiles" in place) == apart, family
    assert (inputs["image_token"]["shape"][1] > 0) == apart, family
    assert inputs["image_cell"]["meaning"].startswith("at an image token the index of its image") == apart, family
