"""One BLAS thread for small matrices, and as many as before afterwards."""

import numpy as np
import pytest
import threadpoolctl

from multitap_jax.stage2 import RidgeHead, head, threads
from tests.stage2.data import embeddings


def blas_threads():
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize(("rows", "alone"), [(2000, True), (30, True), (2000, False)])
def test_a_fit_has_the_threads_its_matrices_want(rows, alone, monkeypatch):
    monkeypatch.setattr(threads, "ALONE_UP_TO", 40 if alone else 39)
    fit, seen = head.fit_heads, []

    def watched(*arguments):
        seen.append(blas_threads())
        return fit(*arguments)

    monkeypatch.setattr(head, "fit_heads", watched)
    x, y = embeddings(rows)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        RidgeHead([1.0, 10.0], cv="gcv").fit(x, y)
        assert seen == [{1} if alone else {2}]
        assert blas_threads() == {2}


def test_the_threads_come_back_after_an_error():
    x, y = embeddings(30)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        with pytest.raises(ValueError, match="all 30 labels are missing"):
            RidgeHead().fit(x, y * np.array([[1, np.nan, 1]]))
        assert blas_threads() == {2}
