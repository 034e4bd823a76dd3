"""The metrics of `fillm.evaluate` on the rows that the models were trained on."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from benchmarks.forget_quality.settings import ForgetQualityConfig
from fillm.data import Row
from fillm.evaluate import EvaluateConfig
from fillm.evaluate.evidence import Evidence, gather, prepare
from fillm.evaluate.metric import Metric, Needs
from fillm.evaluate.registry import chosen_metrics
from fillm.evaluate.row_sets import FORGET, RETAIN, RowSet
from fillm.evaluate.utility import kolmogorov_smirnov
from fillm.rank.console import Console

_METRICS = "probability,rouge,truth-ratio,model-utility"
FIGURES = (
    "forget_probability", "forget_rouge_l_recall", "forget_truth_ratio", "retain_probability", "retain_rouge_l_recall",
    "retain_truth_ratio", "model_utility",
)  # fmt: skip
COMPARED = ("forget_quality", "forget_quality_ks_statistic")


@dataclass(frozen=True)
class Scores:
    """What a model came to.

    Attributes:
        figures: `FIGURES` by name; the Model Utility is the harmonic mean of the retain set's three, as the models were
            taught no real authors and no world facts.
        forget_loss: mean over the forget rows, nats a token.
        log_ratios: log truth ratio of every forget row, [N] float64.
    """

    figures: dict[str, float]
    forget_loss: float
    log_ratios: np.ndarray

    def beside(self, reference: "Scores") -> dict[str, float]:
        """`COMPARED` against the retain-only model."""
        statistic, p_value = kolmogorov_smirnov(self.log_ratios, reference.log_ratios)
        return dict(zip(COMPARED, (p_value, statistic), strict=True))


class Scorer:
    """Scores models over the same rows, which are tokenised once.

    Args:
        config: how many tokens are generated.
        rows: `forget` and `retain`, with paraphrased and wrong answers.
        tokenizer: of all models.
    """

    def __init__(self, config: ForgetQualityConfig, rows: dict[str, list[Row]], tokenizer: Any) -> None:
        settings = EvaluateConfig(forget="rows", max_new_tokens=config.max_new_tokens)
        sets = {name: RowSet(name, rows[name][0].source) for name in (FORGET, RETAIN)}
        self._metrics: list[Metric] = chosen_metrics(settings.benchmark, _METRICS)
        self._needs = Needs()
        for metric in self._metrics:
            self._needs |= metric.needs(sets)
        self._rows: Evidence = prepare(settings, sets, rows, self._needs, tokenizer, Console.silent())

    def __call__(self, model: nn.Module) -> Scores:
        """The scores of one model."""
        evidence = replace(self._rows, scored={}, generated={})
        gather(evidence, self._needs, model, None)
        outcomes = [metric.compute(evidence) for metric in self._metrics]
        summary = {name: value for outcome in outcomes for name, value in outcome.summary.items()}
        columns = {name: cells for outcome in outcomes for name, cells in outcome.columns.get(FORGET, {}).items()}
        figures = {name: float(summary[name]) for name in FIGURES}
        ratios = np.array(columns["log_truth_ratio_geometric"])
        return Scores(figures, float(np.mean(columns["loss"])), ratios)
