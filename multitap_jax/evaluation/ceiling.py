"""How far anything can agree with people who do not agree with each other.

Letters: N pairs, R raters of each.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from multitap_jax.evaluation.correlation import Variant, kendall_tau


@dataclasses.dataclass(frozen=True, slots=True)
class Ceiling:
    """What rater agreement allows.

    Attributes:
      n, raters: pairs, and ratings of each.
      variant: of Kendall's tau.
      one_rater: tau of one rater with the mean of the others, averaged over raters: what one more person reaches.
      mean_of_raters: tau of the mean rating with the single ratings, each pair once for every rater (the x3 protocol of
        Flickr8k-Expert): it has seen what it is judged by, so what has not stays below, as a rule.
      reliability: of the mean of R ratings, from 0 to 1: the intraclass correlation ICC(1, R).
      pearson: the correlation of the mean of R ratings with what raters agree on, sqrt(reliability); a predictor that
        knew this exactly would correlate so with the mean rating.
    """

    n: int
    raters: int
    variant: Variant
    one_rater: float
    mean_of_raters: float
    reliability: float
    pearson: float


def noise_ceiling(ratings: ArrayLike, variant: Variant = "c") -> Ceiling:
    """The ceiling that ratings set.

    Sources: ICC(1, k) as in Shrout and Fleiss, "Intraclass correlations" (1979), case 1; the square root is the
    classical correction for attenuation (Spearman, 1904).

    Args:
      ratings: [N, R], the raters of a pair in any order.
      variant: of Kendall's tau.

    Raises:
      ValueError: fewer than two pairs or raters, or a rating that is no finite number.
    """
    ratings = np.asarray(ratings, np.float64)
    if ratings.ndim != 2 or min(ratings.shape) < 2:
        raise ValueError(f"ratings have shape {ratings.shape}: expected at least 2 pairs, with 2 ratings each or more")
    if not np.isfinite(ratings).all():
        raise ValueError(f"{(~np.isfinite(ratings)).sum()} ratings are NaN or infinite: leave these pairs out")
    n, raters = ratings.shape
    mean = ratings.mean(1)
    between, within = raters * mean.var(ddof=1), ratings.var(1, ddof=1).mean()
    reliability = max(0.0, 1 - within / between) if between else 0.0
    others = [(ratings[:, r], np.delete(ratings, r, 1).mean(1)) for r in range(raters)]
    return Ceiling(
        n,
        raters,
        variant,
        one_rater=float(np.mean([kendall_tau(one, rest, variant) for one, rest in others])),
        mean_of_raters=kendall_tau(np.repeat(mean, raters), ratings.ravel(), variant),
        reliability=float(reliability),
        pearson=float(np.sqrt(reliability)),
    )
