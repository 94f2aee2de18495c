"""`RidgeHead`: one linear head an objective on frozen embeddings, in closed form, with an honest choice of alpha.

    head = RidgeHead().fit_store(EmbeddingStore("embeddings"))      # or .fit(X, Y, groups=image_of_each_text)
    head.predict(X)                                                 # float32[N, T]
    print(head.summary())                                           # a table
    head.save("heads")

The habits are scikit-learn's (parameters, `fit`, `predict`, names ending in an underscore), without needing it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from rich.text import Text

from multitap_jax.display import TextTable
from multitap_jax.files import write_atomic
from multitap_jax.stage2.accumulator import Accumulator, DataError, RawBatch, checked_rows
from multitap_jax.stage2.fitting import Settings, fit_heads
from multitap_jax.stage2.store import EmbeddingStore

FIT_ROWS = 4096


class RidgeHead:
    """Multi-objective ridge regression: predict(X) = X coef_^T + intercept_.

    Args:
      alphas: "auto" (20 values, 1e-6 to 1e2 times the mean eigenvalue of the centred X^T X) or positive numbers, in the
        units of scikit-learn's `Ridge`.
      cv: number of folds (rows of one group stay together; the fold is a hash of the group), or "gcv".
      alpha_per_target: an alpha for each objective, or one for all.
      fit_intercept: False: neither X nor Y is centred.
      selection: "cv", or "train-mse": the alpha with the smallest error on the training rows themselves. That is always
        the smallest one; it is here to reproduce the official code.
      solver: "host" (LAPACK, float64) or "device" (float32 Cholesky with one float64 correction) for the last step.
      seed: of the fold hash.

    Attributes, after fitting:
      coef_: float32[T, H].   intercept_: float64[T].   alpha_: float64[T].
      objective_names_: tuple of T.   n_features_in_: H.   n_rows_: rows read.   n_observed_: int[T], rated rows.
      cv_results_: "alphas" [C, T], "mse" [C, T] (the criterion: held-out, GCV or training error), "r2" [C, T],
        "best_index" [T], with folds also "fold_mse" [Q, C, T], and "tau" [T] where the rows could be read again.
        C alphas, Q folds.
      cv_predictions_: float32[N, T] held-out predictions, or None (single pass, "gcv", "train-mse").
      r2_, tau_: float64[T], R2 and Kendall tau-b at the chosen alpha by the criterion; NaN where not known.
      criterion_: "kfold", "gcv" or "train-mse".
      notes_: what deserves a look: constant objectives, alphas at the edge of the grid.
    """

    def __init__(
        self,
        alphas: str | Sequence[float] | np.ndarray = "auto",
        cv: int | str = 5,
        alpha_per_target: bool = True,
        fit_intercept: bool = True,
        selection: str = "cv",
        solver: str = "host",
        seed: int = 0,
    ) -> None:
        self.alphas = alphas
        self.cv = cv
        self.alpha_per_target = alpha_per_target
        self.fit_intercept = fit_intercept
        self.selection = selection
        self.solver = solver
        self.seed = seed

    _PARAMETERS = ("alphas", "cv", "alpha_per_target", "fit_intercept", "selection", "solver", "seed")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._PARAMETERS}

    def set_params(self, **params: Any) -> "RidgeHead":
        """Changes constructor arguments; ValueError for an unknown one."""
        for name, value in params.items():
            if name not in self._PARAMETERS:
                raise ValueError(f"{name!r} is no parameter of RidgeHead; there are {', '.join(self._PARAMETERS)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"RidgeHead({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    # ---- fitting ----

    def fit(
        self,
        X: np.ndarray,
        Y: np.ndarray,
        sample_weight: np.ndarray | None = None,
        groups: Sequence[str] | None = None,
        objective_names: Sequence[str] | None = None,
    ) -> "RidgeHead":
        """Fits arrays: X [N, H], Y [N, T] (or [N]) with NaN for missing labels, sample_weight [N] >= 0, N groups.

        Raises:
          DataError (a ValueError): shapes that disagree, NaN in X, an objective without labels.
        """
        X, Y = np.asarray(X), np.asarray(Y)
        if len(X) != len(Y):
            raise DataError(f"X has {len(X)} rows, Y has {len(Y)}")
        names = [f"row:{i}" for i in range(len(X))] if groups is None else list(groups)
        weight = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight)

        def batches() -> Iterator[RawBatch]:
            for i in range(0, len(X), FIT_ROWS):
                part = slice(i, i + FIT_ROWS)
                yield RawBatch(X[part], Y[part], names[part], weight[part])

        return self._fit(batches, True, objective_names)

    def fit_store(self, store: EmbeddingStore) -> "RidgeHead":
        """Fits a whole embedding store, shard by shard; memory does not grow with its embeddings."""
        return self._fit(store.batches, True, store.objectives)

    def fit_stream(self, batches: Iterable[Sequence[Any]], objective_names: Sequence[str] | None = None) -> "RidgeHead":
        """Fits batches (X, Y, groups or None[, weights]) of any sizes.

        A generator is read once. An iterable that can be read again (a list, a loader object) is, to refine the
        coefficients to full precision and to give held-out predictions.
        """
        once = iter(batches) is batches
        return self._fit(lambda: batches, not once, objective_names)

    def _fit(self, batches: Callable[[], Iterable[Any]], replayable: bool, names: Sequence[str] | None) -> "RidgeHead":
        folds = self._check_params()
        accumulator = Accumulator(folds, self.fit_intercept)
        for rows in checked_rows(batches(), folds, self.seed):
            accumulator.add(rows)
        names = None if names is None else tuple(names)
        data = accumulator.finish(names)
        names = names or tuple(f"objective_{i}" for i in range(len(data.observed)))
        if len(names) != len(data.observed):
            raise DataError(f"{len(names)} objective names for {len(data.observed)} label columns")
        criterion = "train-mse" if self.selection == "train-mse" else "gcv" if self.cv == "gcv" else "kfold"
        alphas = None if isinstance(self.alphas, str) else np.atleast_1d(np.asarray(self.alphas, np.float64))
        settings = Settings(alphas, criterion, self.alpha_per_target, self.fit_intercept, self.solver)
        replay = (lambda: checked_rows(batches(), folds, self.seed)) if replayable else None
        fit = fit_heads(data, settings, names, replay)
        self.coef_, self.intercept_, self.alpha_ = fit.coef, fit.intercept, fit.alpha
        self.cv_results_, self.cv_predictions_, self.notes_ = fit.cv_results, fit.cv_predictions, fit.notes
        self.objective_names_, self.n_features_in_ = names, data.num_features
        self.n_rows_, self.n_observed_ = data.num_rows, data.observed
        self.criterion_ = criterion
        chosen = fit.cv_results["best_index"]
        self.r2_ = np.take_along_axis(fit.cv_results["r2"], chosen[None, :], axis=0)[0]
        self.tau_ = fit.cv_results.get("tau", np.full(len(names), np.nan))
        return self

    def _check_params(self) -> int:
        """The number of folds; ValueError for a parameter that makes no sense."""
        for name, value, allowed in (
            ("selection", self.selection, ("cv", "train-mse")),
            ("solver", self.solver, ("host", "device")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
        if self.cv != "gcv" and (isinstance(self.cv, (str, bool)) or self.cv < 2):
            raise ValueError(f"cv={self.cv!r}: a number of folds from 2 on, or 'gcv'")
        if isinstance(self.alphas, str):
            if self.alphas != "auto":
                raise ValueError(f"alphas={self.alphas!r}: 'auto' or a list of positive numbers")
        elif not (np.size(self.alphas) and np.all(np.isfinite(self.alphas)) and np.all(np.asarray(self.alphas) > 0)):
            raise ValueError(f"alphas={self.alphas!r}: every alpha must be a positive number")
        return int(self.cv) if self.selection == "cv" and self.cv != "gcv" else 1

    # ---- using ----

    def predict(self, X: np.ndarray) -> np.ndarray:
        """float32[N, T] for X [N, H]; computed in float64, since outlier dimensions cancel against the intercept."""
        self._check_fitted()
        X = np.asarray(X)
        if X.ndim != 2 or X.shape[1] != self.n_features_in_:
            raise DataError(f"X is {X.shape}; this head was fitted on [N, {self.n_features_in_}]")
        out = np.empty((len(X), len(self.intercept_)), np.float32)
        coef = self.coef_.astype(np.float64).T
        for i in range(0, len(X), FIT_ROWS):
            out[i : i + FIT_ROWS] = X[i : i + FIT_ROWS].astype(np.float64) @ coef + self.intercept_[None, :]
        return out

    def score(self, X: np.ndarray, Y: np.ndarray, sample_weight: np.ndarray | None = None) -> float:
        """Mean of R2 over the objectives whose labels vary, each on the rows that have the label; NaN if none does."""
        Y = np.asarray(Y, np.float64).reshape(len(X), -1)
        weight = np.ones(len(Y)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        predicted, scores = self.predict(X), []
        for column in range(Y.shape[1]):
            seen = ~np.isnan(Y[:, column])
            if not weight[seen].any():
                continue
            y, w = Y[seen, column], weight[seen]
            spread = np.sum(w * (y - np.average(y, weights=w)) ** 2)
            if spread > 0:
                scores.append(1.0 - np.sum(w * (y - predicted[seen, column]) ** 2) / spread)
        return float(np.mean(scores)) if scores else float("nan")

    def _check_fitted(self) -> None:
        if not hasattr(self, "coef_"):
            raise ValueError("this RidgeHead is not fitted yet: call fit, fit_store or fit_stream, or load one")

    # ---- keeping ----

    def to_arrays(self) -> dict[str, np.ndarray]:
        """ "ridge.coef" float32[T, H], "ridge.intercept" float64[T], "ridge.alpha" float64[T]."""
        self._check_fitted()
        return {"ridge.coef": self.coef_, "ridge.intercept": self.intercept_, "ridge.alpha": self.alpha_}

    def metadata(self) -> dict[str, Any]:
        """What a head is worth and where it comes from, as plain JSON values (None where not known)."""
        self._check_fitted()
        params = self.get_params()
        if not isinstance(self.alphas, str):
            params["alphas"] = np.atleast_1d(self.alphas).tolist()
        params = {key: value.item() if isinstance(value, np.generic) else value for key, value in params.items()}
        return {
            "format": "multitap-ridge",
            "version": 1,
            "objectives": list(self.objective_names_),
            "alpha": self.alpha_.tolist(),
            "criterion": self.criterion_,
            "r2": [None if np.isnan(value) else float(value) for value in self.r2_],
            "tau": [None if np.isnan(value) else float(value) for value in self.tau_],
            "rows": self.n_rows_,
            "observed": self.n_observed_.tolist(),
            "notes": list(self.notes_),
            "params": params,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> "RidgeHead":
        """The head that `to_arrays` and `metadata` describe; other arrays are left alone.

        Raises:
          DataError: listing every missing or mis-shaped array.
        """
        if (metadata.get("format"), metadata.get("version")) != ("multitap-ridge", 1):
            raise DataError(
                f"metadata of format {metadata.get('format')!r} {metadata.get('version')!r}, not a ridge head"
            )
        names = tuple(metadata["objectives"])
        coef = arrays.get("ridge.coef")
        hidden = coef.shape[-1] if coef is not None and coef.ndim else "H"
        wanted = {"ridge.coef": (len(names), hidden), "ridge.intercept": (len(names),), "ridge.alpha": (len(names),)}
        problems = [
            f"  {key}: {arrays[key].shape if key in arrays else 'missing'}, expected {shape}"
            for key, shape in wanted.items()
            if key not in arrays or arrays[key].shape != shape or not np.isfinite(arrays[key]).all()
        ]
        if problems:
            raise DataError("not a ridge head of these objectives (or not finite):\n" + "\n".join(problems))
        head = cls(**metadata["params"])
        head.coef_ = np.asarray(arrays["ridge.coef"], np.float32)
        head.intercept_ = np.asarray(arrays["ridge.intercept"], np.float64)
        head.alpha_ = np.asarray(arrays["ridge.alpha"], np.float64)
        head.objective_names_, head.n_features_in_ = names, head.coef_.shape[1]
        head.n_rows_, head.n_observed_ = metadata["rows"], np.asarray(metadata["observed"])
        head.r2_, head.tau_ = (np.array(metadata[key], np.float64) for key in ("r2", "tau"))  # None becomes NaN
        head.criterion_, head.notes_ = metadata["criterion"], list(metadata["notes"])
        return head

    def save(self, path: str | Path) -> Path:
        """Writes PATH.safetensors with its PATH.json, or ridge.safetensors and ridge.json in the folder PATH."""
        file = _head_file(Path(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {key: np.ascontiguousarray(value) for key, value in self.to_arrays().items()}
        write_atomic(file.with_suffix(".json"), json.dumps(self.metadata(), indent=1).encode())
        write_atomic(file, safetensors.numpy.save(arrays))
        return file

    @classmethod
    def load(cls, path: str | Path) -> "RidgeHead":
        """Reads what `save` wrote; `cv_results_` and `cv_predictions_` are not kept.

        Raises:
          DataError: for a missing or damaged file.
        """
        file = _head_file(Path(path))
        try:
            arrays = safetensors.numpy.load(file.read_bytes())
            metadata = json.loads(file.with_suffix(".json").read_text("utf-8"))
            return cls.from_arrays(arrays, metadata)
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise DataError(f"{file}: not a saved RidgeHead: {error}") from error

    def summary(self) -> TextTable:
        """A table, a line an objective, notes in its caption: rich and notebooks draw it, `print` shows its text."""
        self._check_fitted()
        heads = f"{len(self.alpha_)} ridge head{'s' * (len(self.alpha_) != 1)}"
        table = TextTable(title=f"{heads} on {self.n_rows_:,} rows, alpha by {self.criterion_}")
        for heading in ("objective", "rated", "alpha", "R2", "tau"):
            table.add_column(heading, justify="left" if heading == "objective" else "right")
        for name, *values in zip(
            self.objective_names_, self.n_observed_, self.alpha_, self.r2_, self.tau_, strict=True
        ):
            observed, alpha, r2, tau = values
            cells = ("-" if np.isnan(value) else f"{value:.3f}" for value in (r2, tau))
            table.add_row(Text(name), f"{observed:,}", f"{alpha:.3g}", *cells)
        notes = list(self.notes_)
        if np.isnan(self.tau_).all():
            why = "the rows were read only once; fit embeddings that are on disk (--embeddings) to have it"
            notes.append(
                f"tau: {why if self.criterion_ == 'kfold' else f'not known, since {self.criterion_} holds no rows out'}"
            )
        table.caption = Text("\n".join(notes)) if notes else None
        return table


def _head_file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / "ridge.safetensors"
