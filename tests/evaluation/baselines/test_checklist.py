"""Checklists: what a file says, what counts, and weights against scikit-learn."""

import json

import numpy as np
import pytest

from multitap_jax.evaluation.baselines import Checklist, ChecklistError, ChecklistWeights, Question, preferences

FILE = """
# a comment
? people: Are there people?
dog: Is there a dog?
hands [people]: Are the hands right?
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "list.txt"
        path.write_text(text)
        return path

    return write


def test_a_file_of_questions(write):
    assert Checklist.read(write(FILE)).questions == (
        Question("people", "Are there people?", mask=True),
        Question("dog", "Is there a dog?"),
        Question("hands", "Are the hands right?", when="people"),
    )


def test_plain_lines_with_masks_given_apart(write):
    """The public lists of VisionReward are lines without names; which questions mask which stands in their code."""
    found = Checklist.read(write("Is there a body?\nIs it sharp?\nIs the body right?\n"), masks={"q1": ["q3"]})
    assert [(q.name, q.mask, q.when) for q in found.questions] == [
        ("q1", True, None),
        ("q2", False, None),
        ("q3", False, "q1"),
    ]
    assert found.features == ("q2", "q3")


def test_masked_answers_are_zero_and_what_is_no_yes_is_no(write):
    checklist = Checklist.read(write(FILE))
    answer = np.array([[1, 1, -1], [-1, 0, 1], [0, -1, 1], [1, 1, 0]], np.int8)
    np.testing.assert_array_equal(checklist.encode(answer), [[1, -1], [-1, 0], [-1, 0], [1, -1]])


def test_the_list_of_the_package():
    checklist = Checklist.default()
    assert len(checklist.questions) == 30
    assert all(question.text.endswith("?") for question in checklist.questions)


@pytest.mark.parametrize(
    ("text", "masks", "message"),
    [
        ("a: Is it?\na: Is it not?", None, "'a' comes twice"),
        ("a [b]: Is it?", None, "'a' waits for 'b', which is no mask"),
        ("? a: Is it?\n? b [a]: Is it?\nc: Is it?", None, "'b' is a mask and waits"),
        ("? a: Is it?", None, "no question counts"),
        ("", None, "no question counts"),
        ("? what is it", None, "neither a question nor"),
        ("a: Is it?", {"q7": ["a"]}, "masks name q7"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(write, text, masks, message):
    with pytest.raises(ChecklistError, match=message):
        Checklist.read(write(text), masks)


def test_preferences_stay_in_their_group_and_leave_out_ties():
    scores = [3.0, 1.0, 1.0, 2.0, float("nan"), 5.0]
    found = preferences(scores, ["a", "a", "a", "b", "a", "b"])
    np.testing.assert_array_equal(found, [(0, 1), (0, 2), (5, 3)])
    assert preferences([1.0, 1.0], "aa").shape == (0, 2)


def problem(seed: int, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.choice([-1.0, 0.0, 1.0], (120, len(truth)))
    scores = features @ truth + 0.7 * rng.standard_normal(120)
    return features, preferences(scores, list(np.arange(120) // 4))


def logistic_of_scikit_learn(difference: np.ndarray, penalty: float) -> np.ndarray:
    linear = pytest.importorskip("sklearn.linear_model")
    both = np.concatenate([difference, -difference])  # scikit-learn wants two classes: each pair stands for itself
    label = np.repeat([1, 0], len(difference))
    model = linear.LogisticRegression(C=0.5 / penalty, fit_intercept=False, tol=1e-10, max_iter=1000)
    return model.fit(both, label).coef_[0]


def test_weights_are_those_of_logistic_regression():
    features, preferred = problem(0, np.array([1.0, 0.5, 2.0]))
    weights = ChecklistWeights.fit("abc", features, preferred, penalty=0.7)
    expected = logistic_of_scikit_learn(features[preferred[:, 0]] - features[preferred[:, 1]], 0.7)
    assert (expected > 0).all()
    np.testing.assert_allclose(weights.coef, expected, rtol=1e-5)
    np.testing.assert_allclose(weights.score(features), features @ expected, rtol=1e-4, atol=1e-6)


def test_weights_below_zero_are_left_out_and_the_rest_fitted_again(tmp_path):
    features, preferred = problem(1, np.array([1.0, -0.8, 0.6, -0.01]))
    weights = ChecklistWeights.fit("abcd", features, preferred)
    difference = features[preferred[:, 0]] - features[preferred[:, 1]]
    kept = weights.coef > 0
    assert not kept[1]
    np.testing.assert_allclose(weights.coef[kept], logistic_of_scikit_learn(difference[:, kept], 1.0), rtol=1e-5)
    weights.save(tmp_path / "weights.json")
    loaded = ChecklistWeights.load(tmp_path / "weights.json", "abcd")
    assert loaded.names == tuple("abcd")
    np.testing.assert_array_equal(loaded.coef, weights.coef)
    turned = ChecklistWeights.load(tmp_path / "weights.json", "dcba")  # a list in another order is the same list
    np.testing.assert_allclose(turned.score(features[:, ::-1]), weights.score(features))


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        ({"a": 1.0, "b": 0.0}, "ab", None),
        ({"a": 1.0, "b": 0.0}, "ac", "no weight for c and weights for b"),
        ({"a": 1.0, "b": 0.0}, "a", "of another checklist: weights for b"),
        ({"a": 1.0}, "abcde", "no weight for b, c, d and 1 more"),
        ({"a": -1.0}, "a", "not below zero, but a is -1"),
        ({"a": float("nan")}, "a", "but a is nan"),
        ({"a": "many"}, "a", "not the weights of a checklist"),
        ([1.0], "a", "not the weights of a checklist"),
    ],
)
def test_weights_are_for_the_questions_that_they_were_fitted_with(tmp_path, content, names, message):
    (tmp_path / "weights.json").write_text(json.dumps(content))
    if message is None:
        assert ChecklistWeights.load(tmp_path / "weights.json", names).names == tuple(names)
        return
    with pytest.raises(ChecklistError, match=message):
        ChecklistWeights.load(tmp_path / "weights.json", names)
    with pytest.raises(ChecklistError, match="none.json: not the weights"):
        ChecklistWeights.load(tmp_path / "none.json", names)


def test_a_question_that_only_misleads_leaves_nothing():
    features, preferred = problem(2, np.array([-1.0]))
    assert ChecklistWeights.fit("a", features, preferred).coef == 0


def test_weights_need_preferences():
    with pytest.raises(ChecklistError, match="0 preferences"):
        ChecklistWeights.fit("a", np.ones((2, 1)), np.zeros((0, 2), int))
