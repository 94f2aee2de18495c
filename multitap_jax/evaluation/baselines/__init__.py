"""The rivals that generate, on our own backbones: written verdicts, checklists, P(yes), expected scores.

judge = Judge.from_pretrained("Qwen2-VL-2B-Instruct")
judge.verdicts(images=["dog.jpg"], texts=["A dog runs."]).scores
"""

from multitap_jax.evaluation.baselines.checklist import (
    Checklist,
    ChecklistError,
    ChecklistWeights,
    Question,
    preferences,
)
from multitap_jax.evaluation.baselines.judge import Judge
from multitap_jax.evaluation.baselines.parsing import parse_score
from multitap_jax.evaluation.baselines.results import Checked, Expected, Verdicts, YesNo

__all__ = [
    "Checked",
    "Checklist",
    "ChecklistError",
    "ChecklistWeights",
    "Expected",
    "Judge",
    "Question",
    "Verdicts",
    "YesNo",
    "parse_score",
    "preferences",
]
