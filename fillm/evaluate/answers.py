"""The answers that are scored: of each row its own, its paraphrase, or its perturbed ones, as token samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fillm.data import Row, SampleSet, tokenize_rows
from fillm.data.samples import IGNORED
from fillm.errors import DataError
from fillm.evaluate.config import EvaluateConfig
from fillm.evaluate.metric import ANSWER, PARAPHRASE
from fillm.evaluate.row_sets import every_row_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowAnswers:
    """One field of the rows of a set, tokenised.

    Attributes:
        samples: one a text, row by row; named `<row>` or, of other fields than the answer, `<row> <field>[number]`.
        counts: texts of each row.
    """

    samples: SampleSet
    counts: tuple[int, ...]

    def prompts(self) -> list[tuple[int, ...]]:
        """What stands before each text: the token ids of the question in its template."""
        return [one.input_ids[: next(i for i, t in enumerate(one.labels) if t != IGNORED)] for one in self.samples]


def tokenize_answers(
    rows: Sequence[Row], field: str, tokenizer: "PreTrainedTokenizerBase | None", config: EvaluateConfig
) -> RowAnswers:
    """Tokenises one field of rows as an answer to their question, as `fillm.data` does for training.

    Raises:
        DataError: a row without the field, or whose text has no token; names the row and the field.
        ModelError: of a tokenizer without an end-of-sequence token or chat template.
    """
    pairs = [pair for row in rows for pair in _texts(row, field)]
    with every_row_counts():
        tokenized = tokenize_rows(
            [row for row, _ in pairs], tokenizer, template=config.template, max_length=config.max_length
        )
    names = [row.id + name for row, name in pairs]
    lost = set(tokenized.shortened)
    samples = SampleSet(
        [replace(one, id=name) for one, name in zip(tokenized, names, strict=True)],
        rows[0].source,
        shortened=[name for one, name in zip(tokenized, names, strict=True) if one.id in lost],
    )
    counts = tuple(len(row.fields[field]) if isinstance(row.fields.get(field), list) else 1 for row in rows)
    return RowAnswers(samples, counts)


def _texts(row: Row, field: str) -> Iterator[tuple[Row, str]]:
    """Rows with each text of the field as their answer, and what to call them."""
    if field == ANSWER:  # of any form that rows have
        yield row, ""
        return
    value, (_, answer) = row.fields.get(field), question_and_answer(row)
    texts = value if isinstance(value, list) else [value]
    there = bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)
    if not there or (field == PARAPHRASE and len(texts) != 1):
        what = "one text" if field == PARAPHRASE else "text, or a list of texts"
        raise DataError(
            f"{row.where}: field {field!r} has to hold {what}; evaluate a split that has it, such as tofu:forget01"
        )
    for number, text in enumerate(texts):
        suffix = f"[{number}]" if isinstance(value, list) else ""
        yield replace(row, fields={**row.fields, answer: text}), f" {field}{suffix}"


def question_and_answer(row: Row) -> tuple[str, str]:
    """What the fields of a row's question and answer are called, as `fillm.data` reads them.

    Raises:
        DataError: a passage, or tokens; names the row.
    """
    for names in (("question", ANSWER), ("text", "labels")):
        if set(names) <= set(row.fields) and "input_ids" not in row.fields:
            return names
    raise DataError(
        f"{row.where}: has no question and answer in words, which this metric needs; give rows with question and "
        "answer, or name others in --metrics"
    )
