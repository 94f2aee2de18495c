"""Synthetic embeddings with the habits of real ones, and the slow obvious fits they are checked against."""

import numpy as np
from sklearn.linear_model import Ridge


def embeddings(
    rows: int, features: int = 40, objectives: int = 3, *, seed: int = 0, rank: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(X float32, Y float32): power-law spectrum, means, three outlier dimensions of mean 3000 and deviation 10."""
    rng = np.random.default_rng(seed)
    rank = rank or features
    loading = np.random.default_rng(1).standard_normal((rank, features)) * np.arange(1, rank + 1)[:, None] ** -0.7
    latent = rng.standard_normal((rows, rank))
    x = latent @ loading + np.random.default_rng(2).standard_normal(features)[None, :]
    outliers = np.arange(1, 4)
    x[:, outliers] = 3000.0 * np.array([1, -1, 1])[None, :] + 10.0 * x[:, outliers]
    truth = np.random.default_rng(3).standard_normal((rank, objectives)) * np.arange(1, rank + 1)[:, None] ** -0.5
    y = latent @ truth / 2 + 3.0 + rng.standard_normal((rows, objectives))
    return x.astype(np.float32), y.astype(np.float32)


def with_missing(y: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """`y` with each label missing by chance."""
    return np.where(np.random.default_rng(seed).random(y.shape) < share, np.float32(np.nan), y)


def sklearn_predictions(
    x: np.ndarray,
    y: np.ndarray,
    alpha: np.ndarray,
    x_new: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    fit_intercept: bool = True,
) -> np.ndarray:
    """float64[N', T]: an own float64 `Ridge` an objective on the rows that have its label."""
    columns = []
    for target in range(y.shape[1]):
        seen = ~np.isnan(y[:, target])
        model = Ridge(alpha=float(alpha[target]), fit_intercept=fit_intercept)
        model.fit(
            x[seen].astype(np.float64),
            y[seen, target].astype(np.float64),
            sample_weight=None if weight is None else weight[seen],
        )
        columns.append(model.predict(x_new.astype(np.float64)))
    return np.stack(columns, axis=1)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference in standard deviations of the expected predictions, worst objective."""
    return float(np.max(np.abs(found - expected).max(0) / expected.std(0)))
