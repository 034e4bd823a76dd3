"""Membership inference: can an attacker tell rows that a model was trained on from rows that it never saw?

Every attack gives a row a score that is low where the attacker suspects training. What counts is how well the scores
of the forget set and of a holdout set come apart, as the area under the ROC curve: 0.5 is no leak, 1 is members known
without fail, below 0.5 the forget set looks stranger than what the model never saw (over-unlearned), which an attacker
can read just as well.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fillm.errors import DataError, NumericsError
from fillm.evaluate.answer_tokens import AnswerTokens
from fillm.evaluate.config import MIN_K_FRACTION

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference")
LEAST_DEVIATION = 1e-3  # a model that is certain of a token has a log-probability without spread


def loss_score(tokens: AnswerTokens) -> float:
    """Mean negative log-likelihood of the answer and its end, in nats a token; Yeom et al. 2018, arXiv 1709.01604."""
    return tokens.loss


def zlib_score(tokens: AnswerTokens, text: str) -> float:
    """The loss over the bytes that `text` takes when compressed: plain text is no sign of training.

    Source: Carlini et al. 2021, arXiv 2012.07805.

    Args:
        tokens: the answer.
        text: its text, in UTF-8 for the compression; level 6.

    Returns:
        Nats a token and byte.
    """
    return tokens.loss / len(zlib.compress(text.encode("utf-8"), 6))


def min_k_score(tokens: AnswerTokens, fraction: float = MIN_K_FRACTION) -> float:
    """Min-K%: mean negative log-likelihood of the least likely tokens; Shi et al. 2024, arXiv 2310.16789.

    Args:
        tokens: the answer, without its end.
        fraction: of the T tokens that count, `max(1, floor(fraction * T))` of them; above 0, at most 1.

    Returns:
        Nats a token, at least 0.
    """
    return -_lowest_mean(tokens.log_probs, fraction)


def min_k_plus_plus_score(tokens: AnswerTokens, fraction: float = MIN_K_FRACTION) -> float:
    """Min-K%++: as Min-K%, each log-probability as its distance from what the model expects, in deviations.

    `z_t = (log p(a_t) - mu_t) / sigma_t`, where `mu_t` and `sigma_t` are mean and standard deviation of
    `log p(. | a_<t)` over the vocabulary under `p` itself. Source: Zhang et al. 2025, arXiv 2404.02936.

    Args:
        tokens: the answer, without its end, with `mean_log_probs` and `std_log_probs`.
        fraction: as in `min_k_score`.

    Returns:
        A pure number; below 0 where even the least likely tokens are more likely than the model expects.
    """
    if tokens.mean_log_probs is None or tokens.std_log_probs is None:
        raise ValueError("Min-K%++ needs the moments over the vocabulary: token_pass(..., vocabulary_moments=True)")
    deviation = np.maximum(tokens.std_log_probs, LEAST_DEVIATION)
    return -_lowest_mean((tokens.log_probs - tokens.mean_log_probs) / deviation, fraction)


def _lowest_mean(values: np.ndarray, fraction: float) -> float:
    # The product of two decimals may lie a rounding below the whole number it means: 0.29 * 100 does.
    count = max(1, math.floor(fraction * len(values) + 1e-9))
    return float(np.sort(values)[:count].mean())


def reference_scores(losses: ArrayLike, reference_losses: ArrayLike) -> np.ndarray:
    """Loss less the loss of a model that never saw the rows: what is hard for everybody is no sign of strangeness.

    Source: Carlini et al. 2021, arXiv 2012.07805, with a reference model of the same kind.

    Args:
        losses: [N] nats a token.
        reference_losses: [N] of the same rows under the reference model.

    Returns:
        [N] float64, nats a token.
    """
    return np.asarray(losses, np.float64) - np.asarray(reference_losses, np.float64)


@dataclass(frozen=True)
class Auc:
    """How well scores tell two sets apart.

    Attributes:
        value: area under the ROC curve, 0 to 1.
        standard_error: of `value`; None with fewer than two rows on a side. 0 where the sets come apart altogether,
            which says nothing of other rows.
        num_members: rows of the forget set.
        num_holdout: rows of the holdout set.
    """

    value: float
    standard_error: float | None
    num_members: int
    num_holdout: int


def auc(members: Sequence[float] | np.ndarray, holdout: Sequence[float] | np.ndarray) -> Auc:
    """Probability that a holdout row scores above a member, a tie counting half: Mann and Whitney's U over m n.

    Exact, from the sorted scores, in any order of the rows; O((m + n) log(m + n)). The standard error is that of
    DeLong, DeLong and Clarke-Pearson 1988, from the spread of the placements of each side among the other, which
    assumes no distribution and holds with ties.

    Args:
        members: [m] scores of rows that the model was trained on, and is to have forgotten; low where suspected.
        holdout: [n] scores of rows that it never saw.

    Raises:
        DataError: a side without rows.
        NumericsError: a score that is NaN.
    """
    # sorted, so that sums do not depend on the order of the rows
    a, b = (np.sort(np.asarray(scores, np.float64)) for scores in (members, holdout))
    m, n = len(a), len(b)
    if m == 0 or n == 0:
        raise DataError(f"membership inference needs forget rows and holdout rows; here are {m} and {n}")
    if np.isnan(a[-1]) or np.isnan(b[-1]):
        raise NumericsError("membership inference: a score is NaN")
    above = 2 * n - np.searchsorted(b, a, "left") - np.searchsorted(b, a, "right")  # twice the placements, whole
    below = np.searchsorted(a, b, "left") + np.searchsorted(a, b, "right")
    error = None
    if m > 1 and n > 1:
        error = math.sqrt(float(np.var(above / (2 * n), ddof=1)) / m + float(np.var(below / (2 * m), ddof=1)) / n)
    return Auc(int(above.sum()) / (2 * m * n), error, m, n)


def privacy_leakage(unlearned: float, retained: float) -> float | None:
    """PrivLeak: how far an AUC is from that of a model that never saw the forget set, in percent of the latter.

    `100 (A_u - A_r) / A_r` with `A = 1 - AUC`, the area under the curve of the attack that takes high scores for
    members. Source: Shi et al. 2025 (MUSE), arXiv 2407.06460.

    Args:
        unlearned: AUC of the unlearned model, 0 to 1.
        retained: AUC of a model trained on the retain set alone, with the same attack and rows.

    Returns:
        0 is no leak; -100 is a forget set as well known as ever; above 0 it is over-unlearned. None where `retained`
        is 1, for which it is not defined.
    """
    if retained == 1.0:
        return None
    return 100.0 * (retained - unlearned) / (1.0 - retained)
