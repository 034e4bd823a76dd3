"""KnowUnDo: what was to be unlearned against knowledge of the same kind that was to stay.

Source: Tian et al. 2024, arXiv 2407.01920. A domain (`privacy`, `copyright`) has rows to unlearn and rows of the
retention scope, each with a training and a validation part; the published evaluation reads the validation parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fillm.errors import DataError, UsageError
from fillm.evaluate.token_pass import AnswerTokens

DOMAINS = ("privacy", "copyright")
LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Scores:
    """What a model makes of one set of N rows.

    Attributes:
        probability: [N] `exp(-loss)` of each answer, end-of-sequence token included.
        rouge_l_recall: [N] of the greedy answer against the true one; None if nothing was generated.
        accuracy: [N] fraction of answer tokens ranked first, end included: the published evaluation's `acc`.
        mean_loss: mean over rows of the loss, in nats a token.
    """

    probability: np.ndarray
    rouge_l_recall: np.ndarray | None
    accuracy: np.ndarray
    mean_loss: float

    @classmethod
    def of(cls, answers: Sequence[AnswerTokens], rouge_l_recall: Sequence[float] | None = None) -> "Scores":
        """From the token statistics of a set's answers and the recall of what was generated.

        Raises:
            DataError: no rows.
        """
        if not len(answers):
            raise DataError("KnowUnDo: a set holds no rows")
        losses = np.array([answer.loss for answer in answers])
        recall = None if rouge_l_recall is None else np.asarray(rouge_l_recall, np.float64)
        accuracy = np.array([float(np.mean(answer.predicted == answer.token_ids)) for answer in answers])
        return cls(np.exp(-losses), recall, accuracy, math.fsum(losses) / len(losses))

    @property
    def perplexity(self) -> float | None:
        """`exp(mean_loss)`, at least 1; None where that is more than a number can hold."""
        return math.exp(self.mean_loss) if self.mean_loss < LARGEST_EXPONENT else None

    def means(self) -> dict[str, float | None]:
        """Each score's mean over the rows, 0 to 1; None where it was not computed."""
        columns = {
            "probability": self.probability,
            "rouge_l_recall": self.rouge_l_recall,
            "accuracy": self.accuracy,
        }
        return {name: None if column is None else math.fsum(column) / len(column) for name, column in columns.items()}


def splits_of(forget: str) -> tuple[str, str]:
    """The specs of the rows to unlearn and of the retention rows that belong to them.

    Args:
        forget: a domain, which stands for its validation rows, or a split such as `privacy/unlearn_train`.

    Raises:
        UsageError: it is neither.
    """
    domain, *part = forget.split("/", 1)
    subset = {(): "val", ("unlearn_val",): "val", ("unlearn_train",): "train"}.get(tuple(part))
    if domain not in DOMAINS or subset is None:
        raise UsageError(
            f"--forget {forget}: of KnowUnDo give privacy or copyright (their validation rows), "
            f"or privacy/unlearn_train"
        )
    return f"knowundo:{domain}/unlearn_{subset}", f"knowundo:{domain}/retention_{subset}"


def summary(unlearn: Scores, retention: Scores) -> dict[str, float | None]:
    """The flat summary of the benchmark.

    For each score `s` in probability, ROUGE-L recall and accuracy: `unlearn_success_s = 1 - mean s(unlearn)`,
    `retention_success_s = mean s(retention)`, `success_s` is their mean. All from 0 to 1, higher is better.

    Args:
        unlearn: of the rows that were to be unlearned.
        retention: of the rows that were to stay.

    Returns:
        Name -> value; None where the score or the perplexity could not be computed.
    """
    found: dict[str, float | None] = {}
    forgotten, kept = unlearn.means(), retention.means()
    for name in forgotten:
        found[f"unlearn_{name}"], found[f"retention_{name}"] = forgotten[name], kept[name]
    for name in forgotten:
        success = None if forgotten[name] is None else 1.0 - forgotten[name]
        found[f"unlearn_success_{name}"], found[f"retention_success_{name}"] = success, kept[name]
        both = success is not None and kept[name] is not None
        found[f"success_{name}"] = 0.5 * (success + kept[name]) if both else None
    found["unlearn_perplexity"], found["retention_perplexity"] = unlearn.perplexity, retention.perplexity
    return found
