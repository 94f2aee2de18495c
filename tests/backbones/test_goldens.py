"""The committed numbers of transformers, for where torch is absent; and that they are transformers' where it is not."""

import json

import jax
import numpy as np
import pytest

from multitap_jax.backbones import Execution
from multitap_jax.weights.hub import load_backbone
from tests.goldens import CASES, FILE, MODES, groups
from tests.tiny_qwen2_vl import pack, tiny_config, torch_model, torch_pooled, write_folder

GOLDENS = {name: np.asarray(rows, np.float32) for name, rows in json.loads(FILE.read_text()).items()}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_backbone(write_folder(tmp_path_factory.mktemp("goldens"), tiny_config()))


forward = jax.jit(lambda model, batch: model(batch, Execution()))


def test_there_is_a_golden_of_every_case():
    assert GOLDENS.keys() == {f"{case}, {mode}" for case in CASES for mode in MODES}
    assert all(np.abs(rows).max() > 1 for rows in GOLDENS.values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_pooled_states_equal_the_goldens(backbone, case, mode):
    batch = pack([[pair] for pair in groups(1, CASES[case])], mode=mode)
    got = np.asarray(forward(backbone, batch))[:, 0]
    np.testing.assert_allclose(got, GOLDENS[f"{case}, {mode}"], atol=2e-5, rtol=0)


def test_the_goldens_are_transformers():
    oracle = torch_model(tiny_config())
    for case, grids in CASES.items():
        for mode in MODES:
            found = torch_pooled(oracle, groups(1, grids), mode=mode)
            np.testing.assert_allclose(GOLDENS[f"{case}, {mode}"], found, atol=1e-5, rtol=0)
