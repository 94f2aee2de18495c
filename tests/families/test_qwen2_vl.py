"""Qwen2-VL against transformers, from pictures and texts to states and gradients."""

import pytest

from tests.families.common import check_parity
from tests.families.qwen2_vl import POLICY, oracle
from tests.families.qwen_checks import PAIRS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    return oracle(), oracle().write(folder), folder


@pytest.mark.parametrize("prompt", ["official-train", "official-eval"])
def test_states_equal_transformers(model, prompt):
    check_parity(*model, PAIRS, prompt=prompt, image_policy=POLICY)


def test_gradients_equal_transformers(model):
    check_parity(*model, PAIRS[:4], gradient=True, image_policy=POLICY)
