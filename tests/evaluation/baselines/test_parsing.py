"""Scores in written verdicts."""

import math

import pytest

from multitap_jax.evaluation.baselines import parse_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85. The response names the dog.", 85),
        ("  **85**: good", 85),
        ("Score: 72\nThe response is right.", 72),
        ("The final score is **72.5** because 3 things are named.", 72.5),
        ("I give it a rating of [[40]].", 40),
        ("Score: 8/10. It is good.", 80),
        ("It deserves 90 out of 100.", 90),
        ("It names 2 of 3 things, so 4 / 5 is fair.", 80),
        ("score 0", 0),
        ("Score out of 100: 85", 85),
        ("The score (out of 100) is 85.", 85),
        ("Rating (out of 5): 4", 80),
        ("100", 100),
    ],
)
def test_a_score_is_read(text, score):
    assert parse_score(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The response is good.",
        "The response names 3 dogs, the image shows 2.",
        "Score: 120",
        "Score: 11/10",
        "Score: 3/0",
        "Score: -5 points",
        "The score is out of 100.",
        "Score: 1,000",
        "80% of it is right",
        "1.2.3",
        "I will score this. There are 3 dogs.",
    ],
)
def test_what_is_no_score_is_none(text):
    assert math.isnan(parse_score(text))


def test_another_scale():
    assert parse_score("Score: 4", highest=5) == 4
    assert parse_score("Score: 50/100", highest=5) == 2.5
