"""Model Utility and Forget Quality of TOFU (Maini et al. 2024, arXiv 2401.06121, sections 2.2.2 and 2.2.3)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fillm.evaluate.metric import Metric, Needs, Outcome, Sets
from fillm.evaluate.row_sets import FORGET, utility_sets
from fillm.evaluate.tofu import (
    BENCHMARKS,
    FORMS,
    SetScores,
    TruthRatioForm,
    add_truth_ratio_columns,
    kept_truth_ratio,
    log_truth_ratios,
    probability_needs,
    rouge_needs,
    scores_of,
    truth_ratio_needs,
)

if TYPE_CHECKING:
    from fillm.evaluate.evidence import Evidence

NO_REFERENCE = (
    "compares with the model that never saw the forget set: evaluate it with this command and give its run folder as "
    "--reference"
)


def harmonic_mean(values: Sequence[float]) -> float:
    """`n / sum(1/x)` of non-negative numbers; 0 if any is 0."""
    return 0.0 if min(values) <= 0.0 else len(values) / sum(1.0 / value for value in values)


def utility_parts(scores: Mapping[str, SetScores], form: TruthRatioForm) -> dict[str, float]:
    """What the model utility is made of: probability, ROUGE-L recall and truth ratio of every set, by name."""
    parts = {}
    for name, each in scores.items():
        parts[f"{name}_probability"] = float(each.probabilities().mean())
        parts[f"{name}_rouge_l_recall"] = each.recall()
        parts[f"{name}_truth_ratio"] = kept_truth_ratio(each.log_truth_ratios(form))
    return parts


def add_model_utility(outcome: Outcome, scores: Mapping[str, SetScores], form: TruthRatioForm) -> None:
    """`model_utility` in the form that is asked for, and in both."""
    parts = {each: utility_parts(scores, each) for each in FORMS}
    outcome.summary["model_utility"] = harmonic_mean(list(parts[form].values()))
    for each in FORMS:
        outcome.summary[f"model_utility_{each}"] = harmonic_mean(list(parts[each].values()))
    nothing = [name for name, value in parts[form].items() if value <= 0.0]
    if nothing:
        outcome.notes["model_utility"] = f"0 because {', '.join(nothing)} is 0"


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two-sided two-sample test: the statistic D in 0..1, and the p-value (exact up to 10 000 rows)."""
    from scipy.stats import ks_2samp  # an extra; `Metric.packages` has seen to it that it is there

    found = ks_2samp(a, b, alternative="two-sided")
    return float(found.statistic), float(found.pvalue)


def add_forget_quality(
    outcome: Outcome, ratios: np.ndarray, reference: np.ndarray | None, missing: str = NO_REFERENCE
) -> None:
    """`forget_quality` and its statistic.

    Args:
        outcome: gets them.
        ratios: log truth ratios of the forget rows; the order of two R and of their logs is the same.
        reference: of the retain model, or None.
        missing: why there are none.
    """
    names = ("forget_quality", "forget_quality_ks_statistic")
    if reference is None:
        outcome.summary |= dict.fromkeys(names)
        outcome.notes |= dict.fromkeys(names, missing)
        return
    statistic, p_value = kolmogorov_smirnov(ratios, reference)
    outcome.summary |= {"forget_quality": p_value, "forget_quality_ks_statistic": statistic}


def _utility_needs(sets: Sets) -> Needs:
    some = utility_sets(sets)
    return probability_needs(some) | truth_ratio_needs(some) | rouge_needs(some)


def _model_utility(evidence: "Evidence") -> Outcome:
    names = [row_set.name for row_set in utility_sets(evidence.sets)]
    scores = {name: scores_of(evidence, name, ratios=True, recalls=True) for name in names}
    outcome = Outcome()
    add_model_utility(outcome, scores, evidence.config.truth_ratio)
    return outcome


def _forget_quality(evidence: "Evidence") -> Outcome:
    outcome, form, reference = Outcome(), evidence.config.truth_ratio, None
    scores = scores_of(evidence, FORGET, ratios=True, probability=False)
    missing = NO_REFERENCE
    if evidence.reference is not None:
        paraphrase = evidence.reference.column(FORGET, "paraphrase_loss")
        perturbed = evidence.reference.column(FORGET, "perturbed_losses")
        if paraphrase is None or perturbed is None:
            missing = "the reference run holds no truth ratios: evaluate the retain model with --metrics forget-quality"
        else:
            reference = log_truth_ratios(np.array(paraphrase), [np.array(losses) for losses in perturbed], form)
    add_forget_quality(outcome, scores.log_truth_ratios(form), reference, missing)
    add_truth_ratio_columns(outcome, FORGET, scores)  # so that this run can be another's reference
    return outcome


METRICS = (
    Metric("model-utility", BENCHMARKS, _utility_needs, _model_utility, packages=("rouge_score",)),
    Metric(
        "forget-quality",
        BENCHMARKS,
        lambda sets: truth_ratio_needs([sets[FORGET]]),
        _forget_quality,
        packages=("scipy",),
    ),
)
