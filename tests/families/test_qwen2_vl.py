"""Qwen2-VL against transformers, from pictures and texts to states and gradients."""

import pytest

from multitap_jax.data.stream import Pair
from tests.families.common import check_parity, picture
from tests.families.qwen2_vl import POLICY, oracle

WIDE, TALL, SMALL = picture(150, 90), picture(60, 200), picture(30, 30)
PAIRS = [
    Pair((WIDE,), "a red ball"),
    Pair((TALL,), "the blue box is far away on the right"),
    Pair((WIDE,), 'a "red" ball is near on your left'),
    Pair((SMALL, WIDE), "a ball", "Which way is safe?"),
    Pair((), "no picture at all"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    return oracle(), oracle().write(folder), folder


@pytest.mark.parametrize("prompt", ["official-train", "official-eval"])
def test_states_equal_transformers(model, prompt):
    check_parity(*model, PAIRS, prompt=prompt, image_policy=POLICY)


def test_gradients_equal_transformers(model):
    check_parity(*model, PAIRS[:4], gradient=True, image_policy=POLICY)
