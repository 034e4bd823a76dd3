"""What the privacy metrics need and what comes of it: memorisation, membership inference, privacy leakage."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fillm.data import shared_rows
from fillm.errors import FillmError
from fillm.evaluate.answer_tokens import AnswerTokens
from fillm.evaluate.gradient_norm import gradient_norms
from fillm.evaluate.membership import (
    ATTACKS,
    auc,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    privacy_leakage,
    reference_scores,
    zlib_score,
)
from fillm.evaluate.memorisation import exact_memorisation, extraction_strength, without_end
from fillm.evaluate.metric import ANSWER, Metric, Needs, Outcome, Sets
from fillm.evaluate.row_sets import FORGET, HOLDOUT
from fillm.rank.passes import Passes

if TYPE_CHECKING:
    from fillm.evaluate.evidence import Evidence

WITH_HOLDOUT = ("tofu", "fictional", "fictional-small")
PAIR = (FORGET, HOLDOUT)
Scores = dict[str, Sequence[float]]  # by row set, one a row


class _Missing(Exception):
    """Why a figure cannot be computed."""


def _memorisation(evidence: "Evidence") -> Outcome:
    answers = _without_end(evidence, FORGET)
    columns = {
        "exact_memorisation": [exact_memorisation(answer) for answer in answers],
        "extraction_strength": [extraction_strength(answer) for answer in answers],
    }
    means = {f"forget_{name}": float(np.mean(np.sort(values))) for name, values in columns.items()}
    return Outcome(means, columns={FORGET: columns})


def _attack(name: str, evidence: "Evidence") -> Outcome:
    figure, error = f"mia_{name}_auc", f"mia_{name}_auc_error"
    try:
        _check_holdout(evidence)
        scores = _SCORES[name](evidence)
    except _Missing as why:
        return Outcome({figure: None, error: None}, {figure: str(why), error: str(why)})
    found = auc(scores[FORGET], scores[HOLDOUT])
    notes = {} if found.standard_error is not None else {error: "needs at least two forget and two holdout rows"}
    columns = {which: {f"mia_{name}": values} for which, values in scores.items()}
    return Outcome({figure: found.value, error: found.standard_error}, notes, columns)


def _leakage(evidence: "Evidence") -> Outcome:
    name = "privacy_leakage"
    try:
        _check_holdout(evidence)
        retained = _retain_auc(evidence)
        scores = _by_row(evidence, _min_k(evidence))
        found = privacy_leakage(auc(scores[FORGET], scores[HOLDOUT]).value, retained)
        if found is None:
            raise _Missing("not defined: the retain model's own AUC is 1")
    except _Missing as why:
        return Outcome({name: None}, {name: str(why)})
    return Outcome({name: found})


def _retain_auc(evidence: "Evidence") -> float:
    """The reference run's AUC of Min-K%, if it can be compared."""
    _check_reference(evidence)
    mine, other = evidence.config.min_k, evidence.reference.settings.get("min_k")
    if mine != other:
        raise _Missing(f"the reference run was made with --min-k {other}, this one with {mine}")
    found = evidence.reference.summary.get("mia_min_k_auc")
    if found is None:
        raise _Missing("the reference run has no mia_min_k_auc")
    return float(found)


def _check_holdout(evidence: "Evidence") -> None:
    if HOLDOUT not in evidence.rows:
        raise _Missing("no holdout rows; give --holdout, rows that no model was trained on")
    shared = shared_rows(evidence.samples(FORGET), evidence.samples(HOLDOUT))
    if shared:
        evidence.console.once("shared", f"holdout and forget share {len(shared)} rows: their AUC is drawn to 0.5")


def _check_reference(evidence: "Evidence") -> None:
    reference = evidence.reference
    if reference is None:
        raise _Missing("no --reference: needs the evaluation of a model that never saw the forget set")
    key = f"{HOLDOUT}.{ANSWER}"
    if reference.fingerprints.get(key) != evidence.samples(HOLDOUT).fingerprint:
        what = "has other holdout rows" if key in reference.fingerprints else "has no holdout rows"
        raise _Missing(f"the reference run {what}")


def _without_end(evidence: "Evidence", which: str) -> list[AnswerTokens]:
    end = getattr(evidence.tokenizer, "eos_token_id", None)
    return [without_end(answer, end) for answer in evidence.answers(which)]


def _by_row(evidence: "Evidence", score: Callable[[AnswerTokens], float], end: bool = False) -> Scores:
    """A score of every answer, with its end-of-sequence token or without."""
    answers = {which: evidence.answers(which) if end else _without_end(evidence, which) for which in PAIR}
    return {which: [score(answer) for answer in some] for which, some in answers.items()}


def _loss(evidence: "Evidence") -> Scores:
    return _by_row(evidence, loss_score, end=True)


def _zlib(evidence: "Evidence") -> Scores:
    tokenizer = evidence.tokenizer
    if tokenizer is None:
        raise _Missing("no tokenizer, without which tokens have no text")

    def score(answer: AnswerTokens) -> float:
        ids = answer.token_ids.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return zlib_score(answer, text)

    return _by_row(evidence, score, end=True)


def _min_k(evidence: "Evidence") -> Callable[[AnswerTokens], float]:
    return partial(min_k_score, fraction=evidence.config.min_k)


def _min_k_plus_plus(evidence: "Evidence") -> Scores:
    return _by_row(evidence, partial(min_k_plus_plus_score, fraction=evidence.config.min_k))


def _gradient_norm(evidence: "Evidence") -> Scores:
    config, processes = evidence.config, evidence.deal.processes
    passes = Passes(evidence.console, tokens_per_batch=config.tokens_per_batch, processes=processes)
    sets = {which: evidence.samples(which) for which in PAIR}
    try:
        with passes.stopping():
            found = gradient_norms(evidence.model, sets, passes, include=config.gradient_include)
    except FillmError as error:
        if error.exit_code != FillmError.exit_code:  # of an interruption, or a fault in another process
            raise
        # The other figures are worth having without this one.
        raise _Missing(processes.outlive(error)) from None
    return {which: norms.tolist() for which, norms in found.items()}


def _reference(evidence: "Evidence") -> Scores:
    _check_reference(evidence)
    scores = {}
    for which in PAIR:
        mine = [answer.loss for answer in evidence.answers(which)]
        losses = evidence.reference.column(which, "mia_loss")
        if losses is None:
            raise _Missing("the reference run has no mia_loss")
        scores[which] = reference_scores(mine, losses).tolist()
    return scores


_SCORES: dict[str, Callable[["Evidence"], Scores]] = {
    "loss": _loss,
    "zlib": _zlib,
    "min_k": lambda evidence: _by_row(evidence, _min_k(evidence)),
    "min_k_plus_plus": _min_k_plus_plus,
    "gradient_norm": _gradient_norm,
    "reference": _reference,
}


def _needs_forget(sets: Sets) -> Needs:
    return Needs(answers=frozenset({(FORGET, ANSWER)}))


def _needs_pair(moments: bool, sets: Sets) -> Needs:
    there = frozenset(PAIR) if HOLDOUT in sets else frozenset()
    return Needs(answers=frozenset((which, ANSWER) for which in there), moments=there if moments else frozenset())


def _attacks(benchmarks: tuple[str, ...], default: bool) -> list[Metric]:
    found = []
    for name in ATTACKS:
        needs = partial(_needs_pair, name == "min_k_plus_plus")
        found.append(Metric(f"mia-{name.replace('_', '-')}", benchmarks, needs, partial(_attack, name), default))
    return [*found, Metric("privacy-leakage", benchmarks, partial(_needs_pair, False), _leakage, default)]


METRICS = (
    Metric("memorisation", (*WITH_HOLDOUT, "knowundo"), _needs_forget, _memorisation),
    *_attacks(WITH_HOLDOUT, default=True),
    *_attacks(("knowundo",), default=False),  # it has no rows that were never trained on; --holdout may give some
)
