"""Tables and scores of a fitted `RidgeHead`."""

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from multitap_jax.display import TextTable
from multitap_jax.evaluation.correlation import Metrics, evaluate_pairs

if TYPE_CHECKING:
    from multitap_jax.stage2.fitted import FittedHead


def summary(head: "FittedHead") -> TextTable:
    """A line an objective; notes in the caption."""
    heads = f"{len(head.alpha_)} ridge head{'s' * (len(head.alpha_) != 1)}"
    table = TextTable(title=f"{heads} on {head.n_rows_:,} rows, alpha by {head.criterion_}")
    for heading in ("objective", "rated", "alpha", "R2", "tau"):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for name, *values in zip(head.objective_names_, head.n_observed_, head.alpha_, head.r2_, head.tau_, strict=True):
        observed, alpha, r2, tau = values
        cells = ("-" if np.isnan(value) else f"{value:.3f}" for value in (r2, tau))
        table.add_row(Text(name), f"{observed:,}", f"{alpha:.3g}", *cells)
    notes = list(head.notes_)
    if np.isnan(head.tau_).all():
        why = "the rows were read only once; fit embeddings that are on disk (--embeddings) to have it"
        if head.criterion_ in ("gcv", "train-mse"):
            why = f"not known, since {head.criterion_} holds no rows out"
        elif not head.store_cv_predictions:
            why = "not known without store_cv_predictions"
        notes.append(f"tau: {why}")
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def mean_r2(predicted: np.ndarray, labels: np.ndarray, weight: np.ndarray | None) -> float:
    """Mean of R2 over the objectives whose labels vary, each on the rows that have the label; NaN if none does."""
    weight = np.ones(len(labels)) if weight is None else np.asarray(weight, np.float64)
    scores = []
    for column in range(labels.shape[1]):
        seen = ~np.isnan(labels[:, column])
        if not weight[seen].any():
            continue
        y, w = labels[seen, column], weight[seen]
        spread = np.sum(w * (y - np.average(y, weights=w)) ** 2)
        if spread > 0:
            scores.append(1.0 - np.sum(w * (y - predicted[seen, column]) ** 2) / spread)
    return float(np.mean(scores)) if scores else float("nan")


def intervals(head: "FittedHead", samples: int, seed: int, level: float) -> dict[str, Metrics]:
    """Objective -> statistics of its held-out predictions with bootstrap intervals over groups."""
    predicted, labels, groups = head.cv_predictions_, head.cv_labels_, head.cv_groups_
    if predicted is None or labels is None or groups is None:
        raise ValueError(
            "there are no held-out predictions: fit with folds, 'loo' or 'logo' and store_cv_predictions=True, on rows "
            "that can be read again"
        )
    found = {}
    for column, name in enumerate(head.objective_names_):
        seen = ~np.isnan(labels[:, column])
        pair = predicted[seen, column], labels[seen, column]
        found[name] = evaluate_pairs(*pair, groups=groups[seen], samples=samples, seed=seed, level=level)
    return found


def append(head: "FittedHead", new: "FittedHead") -> None:
    """Adds the objectives of `new` to `head`. Held-out predictions stay where both have them for the same rows."""
    before = len(head.objective_names_)
    for name in ("coef_", "intercept_", "alpha_", "r2_", "tau_", "n_observed_"):
        setattr(head, name, np.concatenate([getattr(head, name), getattr(new, name)]))
    head.objective_names_ += new.objective_names_
    head.n_rows_ = max(head.n_rows_, new.n_rows_)
    head.notes_ = [*head.notes_, *new.notes_]
    if head.posteriors_:
        moved = [posterior._replace(targets=posterior.targets + before) for posterior in new.posteriors_]
        head.posteriors_ = [*head.posteriors_, *moved]
    head.cv_results_ = _joined(getattr(head, "cv_results_", {}), new.cv_results_)
    groups = getattr(head, "cv_groups_", None)
    same = groups is not None and new.cv_groups_ is not None and np.array_equal(groups, new.cv_groups_)
    for name in ("cv_predictions_", "cv_labels_", "cv_groups_"):
        if not same:
            setattr(head, name, None)
        elif name != "cv_groups_":
            setattr(head, name, np.concatenate([getattr(head, name), getattr(new, name)], axis=1))


def _joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Results of both along the last axis, where their other axes agree."""
    return {
        key: np.concatenate([value, new[key]], axis=-1)
        for key, value in old.items()
        if key in new and value.shape[:-1] == new[key].shape[:-1]
    }
