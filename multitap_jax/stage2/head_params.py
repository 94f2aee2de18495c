"""The parameters of `RidgeHead`, checked before any row is read."""

from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from multitap_jax.stage2.head import RidgeHead

CRITERIA = ("gcv", "loo", "logo")
CHOICES = {"selection": ("cv", "train-mse"), "solver": ("host", "device"), "refine": ("auto", True, False)}


class Folds(NamedTuple):
    """Cross-validation folds, 1 for none, and the seed of their hash."""

    folds: int
    seed: int


def criterion(head: "RidgeHead") -> str:
    """What the parameters ask alphas to be chosen by: "kfold", "gcv", "loo", "logo" or "train-mse"."""
    if head.selection == "train-mse":
        return head.selection
    return head.cv if isinstance(head.cv, str) else "kfold"


def checked(head: "RidgeHead", given_splits: bool = False) -> Folds:
    """The folds that the parameters ask for; `given_splits`: whether the rows come with those of a list `cv`.

    Raises:
      ValueError: a parameter that makes no sense.
    """
    for name, allowed in CHOICES.items():
        if getattr(head, name) not in allowed:
            raise ValueError(f"{name}={getattr(head, name)!r}: choose one of {', '.join(map(str, allowed))}")
    if isinstance(head.alphas, str):
        if head.alphas != "auto":
            raise ValueError(f"alphas={head.alphas!r}: 'auto' or a list of positive numbers")
    elif not (np.size(head.alphas) and np.all(np.isfinite(head.alphas)) and np.all(np.asarray(head.alphas) > 0)):
        raise ValueError(f"alphas={head.alphas!r}: every alpha must be a positive number")
    if not _is_whole(head.seed) or not 0 <= head.seed < 2**63:
        raise ValueError(f"seed={head.seed!r}: a whole number from 0 to 2**63 - 1")
    folds = _folds(head, given_splits)
    return Folds(folds if criterion(head) == "kfold" else 1, int(head.seed))


def _folds(head: "RidgeHead", given_splits: bool) -> int:
    cv = head.cv
    if isinstance(cv, str) and cv in CRITERIA:
        return 1
    if isinstance(cv, (list, tuple)) and len(cv) >= 2:
        if criterion(head) == "kfold" and not given_splits:
            raise ValueError("cv is a list of splits, which know rows by their number: fit arrays, or give a number")
        return len(cv)
    if _is_whole(cv) and cv >= 2:
        return int(cv)
    hint = "; a splitter's splits are list(cv.split(X))" if hasattr(cv, "split") and not isinstance(cv, str) else ""
    raise ValueError(
        f"cv={cv!r}: a number of folds from 2 on, one of {', '.join(CRITERIA)}, or for arrays a list of two or more "
        f"splits (train indices, test indices){hint}"
    )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
