"""Agreement with people: statistics with intervals, benchmarks' protocols, and reports from files."""

from multitap_jax.evaluation.benchmark import BenchmarkReport, evaluate_benchmark
from multitap_jax.evaluation.compare import Comparison, compare_files
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
from multitap_jax.evaluation.protocols import PROTOCOLS, Benchmark, Protocol, protocol_named
from multitap_jax.evaluation.report import EvaluationReport, evaluate_files

__all__ = [
    "PROTOCOLS",
    "Benchmark",
    "BenchmarkReport",
    "Comparison",
    "EvaluationReport",
    "Interval",
    "Metrics",
    "Protocol",
    "Statistic",
    "accuracy_within",
    "bootstrap",
    "compare_files",
    "evaluate_benchmark",
    "evaluate_files",
    "evaluate_pairs",
    "kendall_tau",
    "mse",
    "pearson",
    "protocol_named",
    "spearman",
]
