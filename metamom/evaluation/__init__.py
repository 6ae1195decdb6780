"""Few-shot evaluation of any learner on fresh tasks, and comparisons of learners on the same tasks."""

from metamom.evaluation.adaptable import Adaptable
from metamom.evaluation.comparisons import Compared, Difference, compare_learners, paired, paired_difference
from metamom.evaluation.evaluating import evaluate, evaluate_norms
from metamom.evaluation.result import Evaluation

__all__ = [
    "Adaptable",
    "Compared",
    "Difference",
    "Evaluation",
    "compare_learners",
    "evaluate",
    "evaluate_norms",
    "paired",
    "paired_difference",
]
