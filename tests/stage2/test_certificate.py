"""The expected error of float32 sums bounds the true one, without being so large as to be useless."""

import numpy as np
import pytest

from multitap_jax.stage2 import RidgeHead, final
from multitap_jax.stage2.certificate import FLOOR, Precision
from multitap_jax.stage2.statistics import from_rows
from tests.stage2.data import embeddings, relative_error, sklearn_predictions


@pytest.mark.parametrize("alpha", [1e-2, 1.0, 1e2])
def test_it_bounds_the_true_error(alpha, monkeypatch):
    expected = []
    plain = final.prediction_error
    monkeypatch.setattr(final, "prediction_error", lambda *a: expected.append(plain(*a)) or expected[-1])
    x, y = embeddings(6000, 120)
    once = RidgeHead([alpha], cv="gcv", refine=False).fit(x, y)
    true = relative_error(once.predict(x.astype(np.float64)), sklearn_predictions(x, y, once.alpha_, x))
    rounding = 1e-6  # of the coefficients themselves, which are kept in float32
    assert true < expected[0].max() + rounding
    assert expected[0].max() < 1e4 * max(true, 1e-9)
    again = RidgeHead([alpha], cv="gcv").fit(x, y)
    assert relative_error(again.predict(x.astype(np.float64)), sklearn_predictions(x, y, again.alpha_, x)) < 1e-5


@pytest.mark.parametrize(("bits", "error"), [(23, 3e-7), (10, 3e-3)])
def test_it_finds_a_device_that_multiplies_in_fewer_bits(bits, error):
    x, y = (part.astype(np.float32) for part in embeddings(1000, 60))
    shift, label_shift = x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64)
    wide, labels = x - shift, y - label_shift
    step = np.exp2(np.floor(np.log2(np.abs(wide) + 1e-30)) - bits)
    stats = from_rows(np.round(wide / step) * step, labels, np.ones(1000))
    stats = stats._replace(shift=shift, label_shift=label_shift)
    found = Precision().probe(stats, x, y, np.ones(1000, np.float32))
    assert FLOOR <= found.error < error
    assert (found.error > 1e-6) == (bits == 10)


def test_a_step_that_is_vouched_for_equals_conjugate_gradients(monkeypatch):
    """It saves the pass that would measure its length, and is as exact."""
    x, y = embeddings(6000, 120)
    found = []
    plain = final.refine
    monkeypatch.setattr(final, "refine", lambda *a: found.append(plain(*a)) or found[-1])
    for alpha in (1e3, 1e-4):  # the second is below the error of the Gram, and so never vouched for
        RidgeHead([alpha], cv="gcv", refine=True).fit(x, y)
        with monkeypatch.context() as nothing:
            nothing.setattr(final, "correction_error", lambda *a: np.full(3, np.inf))
            RidgeHead([alpha], cv="gcv", refine=True).fit(x, y)
    passes = [refined.passes for refined in found]
    assert passes[:2] == [1, 2]
    assert passes[2] == passes[3]
    deviation = y.std(0)
    for step, measured in (found[:2], found[2:]):
        moved = (x - x.mean(0)).astype(np.float64) @ (step.coef - measured.coef).T
        assert np.abs(moved).max() < 1e-7 * deviation.min()
