"""The metrics of TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2): probability, ROUGE-L recall, truth ratio."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from fillm.evaluate.metric import ANSWER, PARAPHRASE, PERTURBED, Metric, Needs, Outcome, Sets
from fillm.evaluate.rouge import rouge_l_recalls
from fillm.evaluate.row_sets import FORGET, RowSet, utility_sets

if TYPE_CHECKING:
    from fillm.evaluate.evidence import Evidence

TruthRatioForm = Literal["geometric", "arithmetic"]
FORMS: tuple[TruthRatioForm, ...] = ("geometric", "arithmetic")
BENCHMARKS = ("tofu", "fictional", "fictional-small")


def option_probabilities(true: np.ndarray, wrong: Sequence[np.ndarray]) -> np.ndarray:
    """`P(a) / (P(a) + sum_j P(w_j))` of every row, with `P = exp(-loss)`; arXiv 2401.06121, section 2.2.1.

    Args:
        true: [N] float64, loss of the true answers in nats a token.
        wrong: N arrays, losses of the wrong options of each row.

    Returns:
        [N] float64, in 0..1.
    """
    # Relative to the likeliest, so that not all of them can be 0.
    out = np.empty(len(true))
    for row, (answer, others) in enumerate(zip(true, wrong, strict=True)):
        scores = -np.array([answer, *others])
        weights = np.exp(scores - scores.max())
        out[row] = weights[0] / weights.sum()
    return out


def log_truth_ratios(
    paraphrase: np.ndarray, perturbed: Sequence[np.ndarray], form: TruthRatioForm = "geometric"
) -> np.ndarray:
    """Natural log of every row's truth ratio `R = mean_j P(perturbed_j) / P(paraphrase)`, with `P = exp(-loss)`.

    The paper (equation 1) writes the arithmetic mean over j, its published code takes the geometric one,
    `exp(-mean_j loss_j)`; docs/evaluate.md tells what differs.

    Args:
        paraphrase: [N] float64, loss of the paraphrased answers in nats a token.
        perturbed: N arrays, losses of the perturbed answers of each row.
        form: which mean.

    Returns:
        [N] float64. The log, because R itself leaves the range of numbers for a model that is broken.
    """
    if form == "geometric":
        wrong = np.array([-losses.mean() for losses in perturbed])
    else:
        wrong = np.array([np.logaddexp.reduce(-losses) - np.log(len(losses)) for losses in perturbed])
    return wrong + paraphrase


def forget_truth_ratio(log_ratios: np.ndarray) -> float:
    """Mean of `min(R, 1/R)`, in 0..1: 1 where a model cannot tell true from false."""
    return float(np.exp(-np.abs(log_ratios)).mean())


def kept_truth_ratio(log_ratios: np.ndarray) -> float:
    """Mean of `max(0, 1 - R)`, in 0..1: 1 where a model finds the truth certain."""
    return float(-np.expm1(np.minimum(log_ratios, 0.0)).mean())


class SetScores:
    """The three scores of one row set, from losses and recalls alone: of a model or of a published log.

    Args:
        answer: [N] float64, loss of the answers in nats a token.
        paraphrase: [N] likewise of the paraphrased answers; None where the truth ratio is not asked for.
        perturbed: N arrays likewise; None where neither truth ratio nor options are.
        recalls: [N] ROUGE-L recalls, None where they are not asked for.
        options: whether the probability is normalised over the perturbed answers.
    """

    def __init__(
        self,
        answer: np.ndarray,
        paraphrase: np.ndarray | None,
        perturbed: Sequence[np.ndarray] | None,
        recalls: Sequence[float] | None,
        options: bool,
    ) -> None:
        self.answer, self.recalls, self.options = answer, recalls, options
        self._paraphrase, self._perturbed = paraphrase, perturbed

    @property
    def paraphrase(self) -> np.ndarray:
        """Losses of the paraphrased answers."""
        assert self._paraphrase is not None
        return self._paraphrase

    @property
    def perturbed(self) -> Sequence[np.ndarray]:
        """Losses of the perturbed answers."""
        assert self._perturbed is not None
        return self._perturbed

    def probabilities(self) -> np.ndarray:
        """`exp(-loss)` of every row, or its share of the options."""
        return option_probabilities(self.answer, self.perturbed) if self.options else np.exp(-self.answer)

    def log_truth_ratios(self, form: TruthRatioForm) -> np.ndarray:
        """As the function of that name."""
        return log_truth_ratios(self.paraphrase, self.perturbed, form)

    def recall(self) -> float:
        """Mean ROUGE-L recall."""
        assert self.recalls is not None
        return float(np.mean(self.recalls))


def scores_of(
    evidence: "Evidence", name: str, *, ratios: bool = False, recalls: bool = False, probability: bool = True
) -> SetScores:
    """The scores of one row set of a run, as far as they are asked for."""
    options = evidence.sets[name].options
    answer = np.array([one.loss for one in evidence.answers(name)]) if probability else np.empty(0)
    paraphrase = np.array([one.loss for one in evidence.paraphrases(name)]) if ratios else None
    perturbed = None
    if ratios or (probability and options):
        perturbed = [np.array([one.loss for one in some]) for some in evidence.perturbed(name)]
    found = rouge_l_recalls(evidence.references(name), evidence.generated[name]) if recalls else None
    return SetScores(answer, paraphrase, perturbed, found, options)


def add_probability(outcome: Outcome, name: str, scores: SetScores) -> None:
    """`<set>_probability` and its columns."""
    each = scores.probabilities()
    outcome.summary[f"{name}_probability"] = float(each.mean())
    columns = outcome.columns.setdefault(name, {})
    columns |= {"loss": scores.answer.tolist(), "probability": np.exp(-scores.answer).tolist()}
    if scores.options:
        columns["option_probability"] = each.tolist()


def add_rouge(outcome: Outcome, name: str, scores: SetScores) -> None:
    """`<set>_rouge_l_recall` and its column."""
    outcome.summary[f"{name}_rouge_l_recall"] = scores.recall()
    outcome.columns.setdefault(name, {})["rouge_l_recall"] = [float(one) for one in scores.recalls or ()]


def add_truth_ratio(outcome: Outcome, name: str, scores: SetScores, form: TruthRatioForm) -> None:
    """`<set>_truth_ratio` and its columns: both forms of every row, and the losses that they come from."""
    aggregate = forget_truth_ratio if name == FORGET else kept_truth_ratio
    outcome.summary[f"{name}_truth_ratio"] = aggregate(scores.log_truth_ratios(form))
    add_truth_ratio_columns(outcome, name, scores)


def add_truth_ratio_columns(outcome: Outcome, name: str, scores: SetScores) -> None:
    """The columns of the truth ratio alone."""
    columns = outcome.columns.setdefault(name, {})
    columns |= {
        "paraphrase_loss": scores.paraphrase.tolist(),
        "perturbed_losses": [losses.tolist() for losses in scores.perturbed],
        **{f"log_truth_ratio_{each}": scores.log_truth_ratios(each).tolist() for each in FORMS},
    }


def scored_sets(sets: Sets) -> list[RowSet]:
    """The forget set and those of the model utility."""
    return [sets[FORGET], *utility_sets(sets)]


def probability_needs(some: Sequence[RowSet]) -> Needs:
    """Answers, and where there are options these too."""
    pairs = {(one.name, ANSWER) for one in some} | {(one.name, PERTURBED) for one in some if one.options}
    return Needs(answers=frozenset(pairs))


def truth_ratio_needs(some: Sequence[RowSet]) -> Needs:
    """Perturbed answers and paraphrases, which for options are the answers themselves."""
    pairs = {(one.name, ANSWER if one.options else PARAPHRASE) for one in some}
    return Needs(answers=frozenset(pairs | {(one.name, PERTURBED) for one in some}))


def rouge_needs(some: Sequence[RowSet]) -> Needs:
    """Greedy answers."""
    return Needs(generated=frozenset(one.name for one in some))


def _probability(evidence: "Evidence") -> Outcome:
    outcome = Outcome()
    for row_set in scored_sets(evidence.sets):
        add_probability(outcome, row_set.name, scores_of(evidence, row_set.name))
    return outcome


def _rouge(evidence: "Evidence") -> Outcome:
    outcome = Outcome()
    for row_set in scored_sets(evidence.sets):
        name = row_set.name
        add_rouge(outcome, name, scores_of(evidence, name, recalls=True, probability=False))
        texts = {"question": evidence.questions(name), "answer": evidence.references(name)}
        outcome.columns[name] |= {**texts, "generated": evidence.generated[name]}
    return outcome


def _truth_ratio(evidence: "Evidence") -> Outcome:
    outcome = Outcome()
    for row_set in scored_sets(evidence.sets):
        scores = scores_of(evidence, row_set.name, ratios=True, probability=False)
        add_truth_ratio(outcome, row_set.name, scores, evidence.config.truth_ratio)
    return outcome


METRICS = (
    Metric("probability", BENCHMARKS, lambda sets: probability_needs(scored_sets(sets)), _probability),
    Metric("rouge", BENCHMARKS, lambda sets: rouge_needs(scored_sets(sets)), _rouge, packages=("rouge_score",)),
    Metric("truth-ratio", BENCHMARKS, lambda sets: truth_ratio_needs(scored_sets(sets)), _truth_ratio),
)
