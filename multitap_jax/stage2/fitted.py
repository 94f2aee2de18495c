"""What a fitted head can do: predict, say how sure it is and how far from its rows, show and keep itself."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from multitap_jax.display import TextTable
from multitap_jax.stage2 import head_files, head_tables
from multitap_jax.stage2.estimator import Estimator
from multitap_jax.stage2.rows import DataError
from multitap_jax.stage2.uncertainty import KINDS

PREDICT_ROWS = 4096


class FittedHead(Estimator):
    """The half of `RidgeHead` that needs what fitting leaves, described there, and no rows."""

    alphas: Any
    cv: Any
    store_cv_predictions: bool
    coef_: np.ndarray
    intercept_: np.ndarray
    alpha_: np.ndarray
    objective_names_: tuple[str, ...]
    n_features_in_: int
    n_rows_: int
    n_observed_: np.ndarray
    cv_results_: dict[str, np.ndarray]
    cv_predictions_: np.ndarray | None
    cv_labels_: np.ndarray | None
    cv_groups_: np.ndarray | None
    r2_: np.ndarray
    tau_: np.ndarray
    criterion_: str
    posteriors_: list[Any]
    notes_: list[str]
    _flat: bool

    # ---- using ----

    def predict(self, X: np.ndarray, return_std: bool = False, std: str = "bayes") -> Any:
        """float32[N, T] for X [N, H] (float64 for float64 X; [N] where y was [N]).

        Computed in float64, since outlier dimensions cancel against the intercept.

        With `return_std` also float64[N, T] of the same shape, the standard deviation of a new label: "bayes" or
        "sandwich" (uncertainty.py says which is which).
        """
        self._check_fitted()
        X = self._checked(X)
        wide = np.float64 if X.dtype == np.float64 else np.float32
        out = np.empty((len(X), len(self.intercept_)), wide)
        coef = self.coef_.astype(np.float64).T
        for i in range(0, len(X), PREDICT_ROWS):
            out[i : i + PREDICT_ROWS] = X[i : i + PREDICT_ROWS].astype(np.float64) @ coef + self.intercept_[None, :]
        out = out[:, 0] if self._is_flat else out
        if not return_std:
            return out
        if std not in KINDS:
            raise ValueError(f"std={std!r}: choose one of {', '.join(KINDS)}")
        deviation = np.empty((len(X), len(self.intercept_)))
        for part, posterior, leverage, sandwich in self._variances(X):
            variance = 1.0 + (leverage if std == "bayes" else sandwich)
            deviation[part, posterior.targets] = posterior.noise[None, :] * np.sqrt(variance)
        return out, deviation[:, 0] if self._is_flat else deviation

    def leverage(self, X: np.ndarray) -> np.ndarray:
        """float64[N, T], how far X [N, H] is from the training rows; divided by their own mean leverage.

        1 is typical; above 3 (a usual rule: Belsley, Kuh & Welsch, 1980) the head extrapolates.
        """
        self._check_fitted()
        X = self._checked(X)
        out = np.empty((len(X), len(self.intercept_)))
        for part, posterior, leverage, _ in self._variances(X):
            out[part, posterior.targets] = leverage / posterior.typical[None, :]
        return out

    def out_of_domain(self, X: np.ndarray, above: float = 3.0) -> np.ndarray:
        """bool[N, T]: whether the leverage is more than `above` times that of a typical training row."""
        return self.leverage(X) > above

    def _variances(self, X: np.ndarray) -> Iterator[tuple[Any, ...]]:
        if not self.posteriors_:
            raise ValueError("this head was saved without its uncertainty; save it with uncertainty=True")
        for start in range(0, len(X), PREDICT_ROWS):
            rows = np.arange(start, min(start + PREDICT_ROWS, len(X)))
            for posterior in self.posteriors_:
                yield rows[:, None], posterior, *posterior.variances(X[rows])

    @property
    def _is_flat(self) -> bool:
        return getattr(self, "_flat", False) and len(self.intercept_) == 1

    def _checked(self, X: np.ndarray) -> np.ndarray:
        if hasattr(X, "tocsr"):
            raise TypeError("X is a sparse matrix; RidgeHead takes dense arrays: X.toarray()")
        X = np.asarray(X)
        if X.ndim != 2:
            raise DataError(f"X is {X.ndim}-dimensional, {X.shape}; it must be [N, H]. Reshape your data")
        if X.shape[1] != self.n_features_in_:
            raise DataError(
                f"X has {X.shape[1]} features, but RidgeHead is expecting {self.n_features_in_} features as input: "
                f"this head was fitted on [N, {self.n_features_in_}]"
            )
        if X.dtype.kind not in "fiub" and X.dtype.name != "bfloat16":
            X = X.astype(np.float64)
        if not np.isfinite(X if X.dtype.kind in "fiub" else X.astype(np.float32)).all():
            raise DataError("X holds NaN or infinity; embeddings must be finite")
        return X

    def score(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
        """Mean of R2 over the objectives whose labels vary, each on the rows that have the label; NaN if none does."""
        labels = np.asarray(y, np.float64).reshape(len(X), -1)
        predicted = np.asarray(self.predict(X)).reshape(len(labels), -1)
        return head_tables.mean_r2(predicted, labels, sample_weight)

    def intervals(self, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
        """Objective -> `evaluation.correlation.Metrics` of the held-out predictions, with bootstrap intervals.

        Whole groups are resampled. Needs `cv_predictions_`.
        """
        self._check_fitted()
        return head_tables.intervals(self, samples, seed, level)

    def summary(self) -> TextTable:
        """A table, a line an objective, notes in its caption: rich and notebooks draw it, `print` shows its text."""
        self._check_fitted()
        return head_tables.summary(self)

    # ---- keeping ----

    def to_arrays(self) -> dict[str, np.ndarray]:
        """ "ridge.coef" float32[T, H], "ridge.intercept" float64[T], "ridge.alpha" float64[T]."""
        self._check_fitted()
        return head_files.to_arrays(self)

    def metadata(self) -> dict[str, Any]:
        """What a head is worth and where it comes from, as plain JSON values (None where not known)."""
        self._check_fitted()
        return head_files.metadata(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> Self:
        """The head that `to_arrays` and `metadata` describe.

        Raises:
          DataError: listing every missing or mis-shaped array.
        """
        head_files.check_format(metadata)
        head = cls(**metadata["params"])
        head_files.fill(head, arrays, metadata)
        return head

    def save(self, path: str | Path, uncertainty: bool = False) -> Path:
        """Writes PATH.safetensors with its PATH.json, or ridge.safetensors and ridge.json in the folder PATH.

        The first is the whole head; the JSON shows what its metadata say. A kill leaves the head before or this one.

        `uncertainty` also keeps what `return_std` and `leverage` need: H^2 numbers for each set of training rows.
        """
        self._check_fitted()
        return head_files.save(self, Path(path), uncertainty)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote; `cv_results_` and `cv_predictions_` are not kept.

        Raises:
          DataError: for a missing or damaged file.
        """
        return cls.from_arrays(*head_files.read(Path(path)))
