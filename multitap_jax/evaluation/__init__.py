"""Agreement with people: statistics with intervals, and reports from files."""

from multitap_jax.evaluation.correlation import (
    Interval,
    Metrics,
    Statistic,
    accuracy_within,
    bootstrap,
    evaluate_pairs,
    kendall_tau,
    mse,
    pearson,
    spearman,
)
from multitap_jax.evaluation.report import EvaluationReport, evaluate_files

__all__ = [
    "EvaluationReport",
    "Interval",
    "Metrics",
    "Statistic",
    "accuracy_within",
    "bootstrap",
    "evaluate_files",
    "evaluate_pairs",
    "kendall_tau",
    "mse",
    "pearson",
    "spearman",
]
