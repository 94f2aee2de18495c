"""`RidgeHead`: one linear head an objective on frozen embeddings, in closed form, with an honest choice of alpha.

    head = RidgeHead().fit_store(EmbeddingStore("embeddings"))      # or .fit(X, Y, groups=image_of_each_text)
    head.predict(X)                                                 # float32[N, T];  return_std=True: how sure
    print(head.summary())                                           # a table
    head.save("heads")

The habits are scikit-learn's (parameters, `fit`, `predict`, names ending in an underscore), without needing it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from multitap_jax.parallel.distributed import all_or_none
from multitap_jax.stage2 import head_params, head_tables, persist, threads
from multitap_jax.stage2.accumulator import Accumulator
from multitap_jax.stage2.fitted import FittedHead
from multitap_jax.stage2.fitting import HeadFit, Replay, Settings, fit_heads
from multitap_jax.stage2.rows import DataError, Rows, array_batches, checked_rows, folds_of_splits, with_folds
from multitap_jax.stage2.store import EmbeddingStore


class RidgeHead(FittedHead):
    """Multi-objective ridge regression: predict(X) = X coef_^T + intercept_.

    Args:
      alphas: "auto" (20 values, 1e-6 to 1e2 times the mean eigenvalue of the centred X^T X) or positive numbers, in the
        units of scikit-learn's `Ridge`.
      cv: number of folds (rows of one group stay together; the fold is a hash of the group, or of the row where there
        are no groups), "gcv", "loo" (exact leave-one-out) or "logo" (exact leave-one-group-out). The last two read the
        rows a second time. For arrays also a list of splits (train, test): indices, or masks bool[N].
      alpha_per_target: an alpha for each objective, or one for all.
      fit_intercept: False: neither X nor Y is centred.
      standardize: divide each feature by its deviation over the rated rows first; `coef_` is of X itself either way.
      selection: "cv", or "train-mse": the alpha with the smallest error on the training rows themselves. That is always
        the smallest one; it is here to reproduce the official code.
      solver: "host" (LAPACK, float64) or "device" (float32 Cholesky, corrected by float64 residuals) for the last step.
      refine: "auto": passes over the rows where float32 sums may have moved a prediction by more than 1e-5 deviations
        (certificate.py); True: always; False: never.
      store_cv_predictions: keep held-out predictions and labels of all rows (2 N T numbers).
      seed: of the fold hash.

    Attributes, after fitting:
      coef_: float32[T, H].   intercept_: float64[T].   alpha_: float64[T].
      objective_names_: tuple of T.   n_features_in_: H.   n_rows_: rows read.   n_observed_: int[T], rated rows.
      cv_results_: "alphas" [C, T], "mse" [C, T] (the criterion: held-out, GCV or training error), "r2" [C, T],
        "best_index" [T], with folds also "fold_mse" [Q, C, T], and "tau" [T] with held-out predictions. C alphas, Q
        folds. An infinite mse marks an alpha that could not be scored.
      cv_predictions_, cv_labels_: float32[N, T], and cv_groups_: uint64[N], or None (single pass, "gcv", "train-mse").
      r2_, tau_: float64[T], R2 and Kendall tau-b at the chosen alpha by the criterion; NaN where not known.
      criterion_: "kfold", "gcv", "loo", "logo" or "train-mse".
      posteriors_: what `predict(return_std=True)` and `leverage` need.
      notes_: what deserves a look: constant objectives, alphas at the edge of the grid.
    """

    def __init__(
        self,
        alphas: str | Sequence[float] | np.ndarray = "auto",
        cv: int | str | Sequence[tuple[Any, Any]] = 5,
        alpha_per_target: bool = True,
        fit_intercept: bool = True,
        standardize: bool = False,
        selection: str = "cv",
        solver: str = "host",
        refine: str | bool = "auto",
        store_cv_predictions: bool = True,
        seed: int = 0,
    ) -> None:
        self.alphas = alphas
        self.cv = cv
        self.alpha_per_target = alpha_per_target
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.selection = selection
        self.solver = solver
        self.refine = refine
        self.store_cv_predictions = store_cv_predictions
        self.seed = seed

    # ---- fitting ----

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray | None = None,
        groups: Sequence[str] | None = None,
        objective_names: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "RidgeHead":
        """Fits arrays: X [N, H], y [N, T] (or [N]) with NaN for missing labels, sample_weight [N] >= 0, N groups.

        Raises:
          DataError (a ValueError): shapes that disagree, NaN in X, an objective without labels.
        """
        batches = array_batches(X, y, sample_weight, groups, sources)
        flat = np.asarray(y).ndim == 1
        fold = None
        if isinstance(self.cv, (list, tuple)) and self.criterion == "kfold":
            fold = folds_of_splits(self.cv, len(X))
        return self._fit(batches, True, objective_names, mesh, flat, fold)

    def fit_store(self, store: EmbeddingStore, mesh: jax.sharding.Mesh | None = None) -> "RidgeHead":
        """Fits a whole embedding store, shard by shard; memory does not grow with its embeddings.

        With several processes and a `mesh` over them, each reads its share of the shards and all get the same head.

        Raises:
          StoreError: a missing or damaged shard.   DataError: labels that cannot be fitted.
          OtherProcessError: of another process's share.
        """
        share = (jax.process_index(), jax.process_count()) if mesh is not None else (0, 1)
        return self._fit(
            lambda: store.batches(share=share, as_stored=True), True, store.objectives, mesh, in_step=mesh is not None
        )

    def fit_stream(
        self,
        batches: Iterable[Sequence[Any]],
        objective_names: Sequence[str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "RidgeHead":
        """Fits batches (X, Y, groups or None[, weights[, sources]]) of any sizes.

        A generator is read once. An iterable that can be read again (a list, a loader object) is, to refine the
        coefficients to full precision and to give held-out predictions. With several processes and a `mesh` over them,
        each gives its own rows; one whose batches fail raises at once, and the others, which it cannot reach, must be
        ended too.
        """
        once = iter(batches) is batches
        return self._fit(lambda: batches, not once, objective_names, mesh)

    def collect(
        self, batches: Iterable[Sequence[Any]] | EmbeddingStore, mesh: jax.sharding.Mesh | None = None
    ) -> Accumulator:
        """Only collects moments, for `fit_moments` to solve any number of times; persist.py saves and merges them."""
        folds, seed = head_params.checked(self)
        data = Accumulator(folds, seed, mesh=mesh, count_groups=self.criterion == "logo")
        found: Iterable[Any] = batches.batches(as_stored=True) if isinstance(batches, EmbeddingStore) else batches
        for rows in checked_rows(found, folds, seed):
            data.add(rows)
        return data

    def fit_moments(
        self,
        data: Accumulator,
        *,
        objective_names: Sequence[str] | None = None,
        objectives: Sequence[int] | None = None,
        source_weights: Mapping[str, float] | None = None,
        leave_out: Sequence[str] = (),
    ) -> "RidgeHead":
        """Solves collected moments, without the rows.

        Args:
          data: from `collect`, or loaded and merged. Its folds must be those of this head.
          objective_names: of all its objectives.
          objectives: indices of those to fit; None: all.
          source_weights: by which the sample weights of a source (a data set) are multiplied.
          leave_out: sources that do not count at all.

        Raises:
          DataError: other folds, a source that no row comes from, or an objective without labels.
        """
        folds, _ = head_params.checked(self)
        if data.folds != folds:
            raise DataError(f"the moments were collected for {data.folds} folds, this head has {folds}; collect again")
        weights = {**(source_weights or {}), **dict.fromkeys(leave_out, 0.0)}
        if any(not (np.isfinite(weight) and weight >= 0) for weight in weights.values()):
            raise DataError(f"source_weights={weights}: weights must be finite and >= 0")
        if weights:
            _check_sources(data, weights)
        return self._solve(data, None, objective_names, objectives, weights)

    def partial_fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray | None = None,
        groups: Sequence[str] | None = None,
        objective_names: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> "RidgeHead":
        """Adds rows to those of earlier calls and solves again; memory stays that of the moments.

        Raises:
          DataError: rows or names that do not fit; none of the rows was added. Also an objective that has no labels
            yet: those rows count.
        """
        if not hasattr(self, "moments_"):
            self.moments_ = Accumulator(*head_params.checked(self))
        data = self.moments_
        batches = array_batches(X, y, sample_weight, groups, sources)
        if not data.is_empty and np.shape(X)[1] != data.num_features:
            raise DataError(
                f"X has {np.shape(X)[1]} features, but RidgeHead is expecting {data.num_features} features as "
                "input: partial_fit goes on with the rows before"
            )
        every = list(checked_rows(batches(), data.folds, data.seed))
        names = objective_names or getattr(self, "objective_names_", None)
        if names is not None and every:
            _objective_names(names, every[0].y.shape[1])
        for rows in every:
            data.add(rows)
        self._flat = np.asarray(y).ndim == 1
        return self._solve(data, None, names, None, {})

    def add_objectives(
        self,
        X: np.ndarray,
        y: np.ndarray,
        objective_names: Sequence[str],
        sample_weight: np.ndarray | None = None,
        groups: Sequence[str] | None = None,
    ) -> "RidgeHead":
        """Fits further objectives with the same parameters and appends them; the others keep every bit.

        Raises:
          DataError: other features, or a name that is taken.
        """
        self._check_fitted()
        taken = sorted(set(objective_names) & set(self.objective_names_))
        if taken:
            raise DataError(f"objectives {taken} are fitted already; choose other names, or fit a new head")
        if np.ndim(X) != 2 or np.shape(X)[1] != self.n_features_in_:
            raise DataError(f"X is {np.shape(X)}; this head was fitted on [N, {self.n_features_in_}]")
        new = type(self)(**self.get_params())
        new.fit(X, np.asarray(y).reshape(len(X), -1), sample_weight, groups, objective_names)
        head_tables.append(self, new)
        return self

    def _fit(
        self,
        batches: Callable[[], Iterable[Any]],
        replayable: bool,
        names: Sequence[str] | None,
        mesh: jax.sharding.Mesh | None = None,
        flat: bool = False,
        fold: np.ndarray | None = None,
        in_step: bool = False,
    ) -> "RidgeHead":
        """Collects all batches and solves; `in_step`: processes that read at one pace tell each other of errors."""
        folds, seed = head_params.checked(self, given_splits=fold is not None)
        data = Accumulator(folds, seed, mesh=mesh, count_groups=self.criterion == "logo")
        # Hashing takes a tenth of a pass: not where no row is ever held out with its group, nor a group remembered.
        held_out = self.criterion in ("loo", "logo", "kfold")
        grouped = held_out and (self.criterion != "loo" or self.store_cv_predictions)

        def checked() -> Iterator[Rows]:
            rows = checked_rows(batches(), folds, seed, grouped)
            return rows if fold is None else with_folds(rows, fold)

        def collect() -> None:
            for rows in checked():
                data.add(rows)
            data.settle()

        all_or_none(collect) if in_step else collect()
        if mesh is not None and jax.process_count() > 1:
            data = persist.gather(data)
        replay = checked if replayable else None
        self._flat = flat
        return self._solve(data, replay, names, None, {})

    def _solve(
        self,
        data: Accumulator,
        replay: Replay | None,
        names: Sequence[str] | None,
        objectives: Sequence[int] | None,
        source_weights: Mapping[str, float],
    ) -> "RidgeHead":
        count = len(data.labels.observed)
        every = _objective_names(names, count)
        targets = np.arange(count) if objectives is None else np.asarray(objectives, np.int64)
        if len(targets) == 0 or not ((targets >= 0) & (targets < count)).all() or len(set(targets)) < len(targets):
            raise DataError(f"objectives={objectives}: distinct indices from 0 to {count - 1} are expected")
        chosen = tuple(every[target] for target in targets)
        settings = Settings(
            alphas=None if isinstance(self.alphas, str) else np.atleast_1d(np.asarray(self.alphas, np.float64)),
            criterion=self.criterion,
            alpha_per_target=self.alpha_per_target,
            fit_intercept=self.fit_intercept,
            standardize=self.standardize,
            solver=self.solver,
            refine=self.refine,
            cv_predictions=self.store_cv_predictions,
            targets=targets,
            source_weights=source_weights,
        )
        with threads.for_matrices(min(data.num_features, data.labels.num_rows)):
            self._take(fit_heads(data, settings, chosen, replay), data, chosen)
        return self

    def _take(self, fit: HeadFit, data: Accumulator, names: tuple[str, ...]) -> None:
        self.coef_, self.intercept_, self.alpha_ = fit.coef, fit.intercept, fit.alpha
        self.cv_results_, self.notes_, self.posteriors_ = fit.cv_results, fit.notes, fit.posteriors
        held_out = fit.held_out
        self.cv_predictions_ = None if held_out is None else held_out.predicted
        self.cv_labels_ = None if held_out is None else held_out.labels
        self.cv_groups_ = None if held_out is None else held_out.groups
        self.objective_names_, self.n_features_in_ = names, data.num_features
        self.n_rows_, self.n_observed_, self.criterion_ = data.labels.num_rows, fit.observed, self.criterion
        chosen = fit.cv_results["best_index"]
        self.r2_ = np.take_along_axis(fit.cv_results["r2"], chosen[None, :], axis=0)[0]
        self.tau_ = fit.cv_results.get("tau", np.full(len(names), np.nan))

    @property
    def criterion(self) -> str:
        """What the parameters ask alphas to be chosen by: "kfold", "gcv", "loo", "logo" or "train-mse"."""
        return head_params.criterion(self)


def _objective_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """Names of all objectives, numbered ones where none are given; DataError unless there are `count` distinct ones."""
    if names is None:
        return tuple(f"objective_{i}" for i in range(count))
    if len(names) != count:
        raise DataError(f"{len(names)} objective names for {count} label columns")
    if twice := sorted(name for name, times in Counter(names).items() if times > 1):
        raise DataError(f"objective names {twice} are given more than once; every objective needs its own")
    return tuple(names)


def _check_sources(data: Accumulator, sources: Iterable[str]) -> None:
    """DataError for a source that none of the collected rows come from, and which would change nothing."""
    rows, kept = data.labels.num_rows, data.kept
    known = set(kept.source.tolist()) if kept is not None else {key.source for key in data.statistics()}
    if unknown := sorted(set(sources) - known):
        raise DataError(
            f"leave_out or source_weights name {unknown}, but the rated ones of the {rows} rows come from "
            f"{sorted(known)}; give one of these"
        )
