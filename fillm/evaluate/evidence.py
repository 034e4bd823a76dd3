"""What all metrics of a run look at, gathered once: one pass over every answer, one generation for every question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from torch import nn

from fillm.data import Row, Sample, SampleSet, check_fits_model
from fillm.evaluate.answer_tokens import AnswerTokens, token_pass
from fillm.evaluate.answers import RowAnswers, question_and_answer, tokenize_answers
from fillm.evaluate.config import DEFAULT_BATCH_SIZE, EvaluateConfig
from fillm.evaluate.dealing import Deal
from fillm.evaluate.generate import greedy_answers
from fillm.evaluate.metric import ANSWER, PARAPHRASE, PERTURBED, Needs
from fillm.evaluate.reference import Reference
from fillm.evaluate.row_sets import RowSet
from fillm.evaluate.stages import kept_answers, kept_texts
from fillm.rank.console import Console
from fillm.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Evidence:
    """What metrics compute from.

    Attributes:
        config: the settings, resolved.
        sets: the benchmark's row sets by name, those that are not read included.
        rows: the rows that were read, by row set.
        samples_of: tokenised, by (row set, field).
        scored: what the model thinks of them, by (row set, field); one entry a text, in the order of the samples.
        generated: the greedy answers, by row set; one a row.
        reference: the run of the model that never saw the forget set, or None.
        model: for metrics that need more than all this.
        tokenizer: likewise.
        console: for the progress of their own passes.
        deal: of all passes to the processes of the run.
    """

    config: EvaluateConfig
    sets: Mapping[str, RowSet]
    rows: Mapping[str, list[Row]]
    samples_of: dict[tuple[str, str], RowAnswers]
    scored: dict[tuple[str, str], list[AnswerTokens]] = field(default_factory=dict)
    generated: dict[str, list[str]] = field(default_factory=dict)
    reference: Reference | None = None
    model: nn.Module | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    console: Console = field(default_factory=Console.silent)
    deal: Deal = field(default_factory=Deal)

    def answers(self, row_set: str) -> list[AnswerTokens]:
        """Of each row's answer."""
        return self.scored[row_set, ANSWER]

    def paraphrases(self, row_set: str) -> list[AnswerTokens]:
        """Of each row's paraphrased answer; where the perturbed answers are options, of the answer itself."""
        return self.scored[row_set, ANSWER if self.sets[row_set].options else PARAPHRASE]

    def perturbed(self, row_set: str) -> list[list[AnswerTokens]]:
        """Of each row's perturbed answers."""
        every = self.scored[row_set, PERTURBED]
        ends = accumulate(self.samples_of[row_set, PERTURBED].counts, initial=0)
        return [every[begin:end] for begin, end in pairwise(ends)]

    def questions(self, row_set: str) -> list[str]:
        """Each row's question, without its template."""
        return [str(row.fields[question_and_answer(row)[0]]) for row in self.rows[row_set]]

    def references(self, row_set: str) -> list[str]:
        """Each row's answer as text."""
        return [str(row.fields[question_and_answer(row)[1]]) for row in self.rows[row_set]]

    def samples(self, row_set: str) -> SampleSet:
        """Each row's question and answer, tokenised."""
        return self.samples_of[row_set, ANSWER].samples


def prepare(
    config: EvaluateConfig,
    sets: Mapping[str, RowSet],
    rows: Mapping[str, list[Row]],
    needs: Needs,
    tokenizer: "PreTrainedTokenizerBase | None",
    console: Console,
) -> Evidence:
    """Tokenises what the metrics need; no model is looked at yet.

    Raises:
        DataError, ModelError: as `tokenize_answers`.
    """
    for row in (row for name in sorted(needs.generated) for row in rows[name]):
        question_and_answer(row)
    pairs = {(name, ANSWER) for name in needs.row_sets} | needs.answers
    samples_of = {}
    for name, which in sorted(pairs):
        samples_of[name, which] = tokenize_answers(rows[name], which, tokenizer, config)
        shortened = samples_of[name, which].samples.shortened
        if shortened:
            console.warn(
                f"{sets[name].spec}: {len(shortened)} texts lost their end to --max-length {config.max_length}, "
                f"{shortened[0]} the first"
            )
    return Evidence(config, sets, rows, samples_of, tokenizer=tokenizer, console=console)


def gather(evidence: Evidence, needs: Needs, model: nn.Module, folder: RunFolder | None) -> None:
    """Runs the passes that the metrics need, and keeps each in the folder as soon as it is over.

    Args:
        evidence: as `prepare` made it; is filled.
        needs: of all metrics together.
        model: on its device.
        folder: of the run; None in the Python API without `out`, and in other processes than the first.

    Raises:
        DataError: rows that the model cannot take.
        NumericsError, OutOfMemoryError: as `token_pass` and `greedy_answers`.
    """
    evidence.model = model
    for (name, _), answers in evidence.samples_of.items():
        check_fits_model(answers.samples, model, f"--forget {evidence.config.forget} ({name})")
    with_moments = {pair for pair in needs.answers if pair[1] == ANSWER and pair[0] in needs.moments}
    for moments, pairs in ((False, needs.answers - with_moments), (True, with_moments)):
        if pairs:
            evidence.scored |= _score(evidence, sorted(pairs), moments, folder)
    for name in sorted(needs.generated):
        evidence.generated[name] = _generate(evidence, name, folder)


def _score(
    evidence: Evidence, pairs: Sequence[tuple[str, str]], moments: bool, folder: RunFolder | None
) -> dict[tuple[str, str], list[AnswerTokens]]:
    """One pass over every text of the pairs; a text that stands in several is read once."""
    samples = [sample for pair in pairs for sample in evidence.samples_of[pair].samples]
    place: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    unique: list[Sample] = []
    for sample in samples:
        if place.setdefault((sample.input_ids, sample.labels), len(unique)) == len(unique):
            unique.append(sample)
    label = "answers with vocabulary moments" if moments else "answers"

    def run() -> list[AnswerTokens]:
        with evidence.console.progress(label, len(unique)) as bar:
            return token_pass(
                evidence.model,
                SampleSet(unique, label),
                tokens_per_batch=evidence.config.tokens_per_batch,
                batch_size=evidence.config.batch_size,
                vocabulary_moments=moments,
                progress=bar,
                notice=evidence.console.warn,
                deal=evidence.deal,
            )

    counts = [sample.num_counted for sample in unique]
    found = kept_answers(folder, "answers-moments" if moments else "answers", counts, moments, run, evidence.deal)
    every = iter([found[place[sample.input_ids, sample.labels]] for sample in samples])
    return {pair: [next(every) for _ in evidence.samples_of[pair].samples] for pair in pairs}


def _generate(evidence: Evidence, name: str, folder: RunFolder | None) -> list[str]:
    prompts = evidence.samples_of[name, ANSWER].prompts()

    def run() -> list[str]:
        with evidence.console.progress(f"generation, {name}", len(prompts)) as bar:
            return greedy_answers(
                evidence.model,
                evidence.tokenizer,
                prompts,
                max_new_tokens=evidence.config.max_new_tokens,
                batch_size=evidence.config.batch_size or DEFAULT_BATCH_SIZE,
                progress=bar,
                notice=evidence.console.warn,
                deal=evidence.deal,
            )

    return kept_texts(folder, f"generated-{name}", run, evidence.deal)
