"""What a command was given as data -> rows -> samples, with one line for whatever is left out or does not fit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fillm.config import printable
from fillm.data.rows import Row, load_rows
from fillm.data.samples import SampleSet, shared_rows, take
from fillm.data.tokens import tokenize_rows
from fillm.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DataLike = str | Sequence[Mapping[str, Any]] | Any  # a spec, a datasets.Dataset, or any sequence of rows
_LISTED = 10  # skipped rows that are named one by one; the run's record has them all


class RowSettings(Protocol):
    """The settings that every command which reads rows has."""

    @property
    def data_root(self) -> str | None:
        """Folder that holds tofu/ and knowundo/."""

    @property
    def template(self) -> str:
        """How question and answer become text."""

    @property
    def max_length(self) -> int:
        """Most tokens of a sample."""

    @property
    def skip_bad_rows(self) -> bool:
        """Whether rows that cannot be used are left out."""


class SetSettings(RowSettings, Protocol):
    """The settings of a command that reads a forget and a retain set."""

    @property
    def num_forget(self) -> int | None:
        """How many forget samples to draw; None for all."""

    @property
    def num_retain(self) -> int | None:
        """How many retain samples to draw; None for all."""

    @property
    def seed(self) -> int:
        """Of the draws."""

    @property
    def strict(self) -> bool:
        """Whether a warning about the data is an error."""


@dataclass(frozen=True)
class Reading:
    """Reads a command's data as its settings say.

    In two steps, because rows are read and checked before any model is loaded, and a tokenizer may be trained on them.

    Attributes:
        settings: the command's own.
        warn: told, in a line each, of the first rows that were skipped, and how many there are.
    """

    settings: RowSettings
    warn: Callable[[str], None]

    def rows(self, given: DataLike, option: str) -> list[Row]:
        """The rows of a data spec, of a `datasets.Dataset`, or of any sequence of rows.

        Args:
            given: the value of the option.
            option: the flag that it belongs to, for messages.

        Raises:
            UsageError: nothing was given.
            DataError: it cannot be read.
        """
        if given is None:
            raise UsageError(f"{option} is needed: a data spec such as rows.jsonl or tofu:forget05")
        return load_rows(given, data_root=self.settings.data_root, skip_bad_rows=self.settings.skip_bad_rows)

    def samples(
        self, rows: list[Row], tokenizer: "PreTrainedTokenizerBase | None", option: str, source: str | None = None
    ) -> SampleSet:
        """Tokenises what `rows` returned.

        Args:
            rows: the rows.
            tokenizer: of the model; None if all rows carry `input_ids`.
            option: the flag that they came from, for messages.
            source: what the set is called; None takes it from the first row.

        Raises:
            DataError, ModelError, UsageError: as `tokenize_rows`.
        """
        settings = self.settings
        found = tokenize_rows(
            rows,
            tokenizer,
            template=settings.template,
            max_length=settings.max_length,
            skip_bad_rows=settings.skip_bad_rows,
            source=source,
        )
        lines = skipped_lines([found])
        for line in lines[:_LISTED]:
            self.warn(printable(f"skipped {line}"))
        if lines:
            rest = f"; the first {_LISTED} are listed here, all in the run's record" if len(lines) > _LISTED else ""
            self.warn(f"{option}: {len(lines)} of {len(rows)} rows skipped{rest}")
        if found.shortened:
            line = f"{option}: {len(found.shortened)} of {len(rows)} rows lost part of their answer to --max-length "
            line += f"{settings.max_length}, {found.shortened[0]} the first"
            if getattr(settings, "strict", False):
                raise DataError(f"{line}; raise it, or leave out --strict")
            self.warn(line)
        return found


def forget_and_retain(
    settings: SetSettings, tokenizer: "PreTrainedTokenizerBase | None", rows: Mapping[str, list[Row]], reading: Reading
) -> dict[str, SampleSet]:
    """The samples of `forget` and `retain`, or of the one that is given, as many as the settings say.

    Args:
        settings: with the sets' specs in `forget` and `retain`, by which they are called.
        tokenizer: of the model; None if all rows carry `input_ids`.
        rows: by the name of the set.
        reading: of the same command.

    Raises:
        DataError: of rows that cannot be used; with `strict`, of rows that both sets share.
        UsageError: of a count that is out of range.
    """
    sets = {}
    for which, some in rows.items():
        found = reading.samples(some, tokenizer, f"--{which}", source=getattr(settings, which) or which)
        sets[which] = take(found, getattr(settings, f"num_{which}"), settings.seed, option=f"--num-{which}")
    if len(sets) == 2 and (shared := shared_rows(sets["forget"], sets["retain"])):
        line = f"forget and retain share {len(shared)} rows"
        if settings.strict:
            raise DataError(f"{line}; take them out of one, or leave out --strict")
        reading.warn(line)
    return sets


def skipped_lines(sets: Iterable[SampleSet]) -> list[str]:
    """`where: why` of every row that was left out of the sets, in their order."""
    return [f"{where}: {why}" for samples in sets for where, why in samples.skipped]


def check_fits_model(samples: SampleSet, model: "nn.Module", option: str) -> None:
    """Refuses samples that a model cannot take: token ids outside its vocabulary, more tokens than positions.

    A model without input embeddings, or that states no number of positions, is taken at its word.

    Args:
        samples: at least one.
        model: the model, its weights loaded or not.
        option: the flag that the samples came from, for messages.

    Raises:
        DataError: names the first sample with a token too large, or the longest one.
    """
    if hasattr(model, "get_input_embeddings"):
        size = model.get_input_embeddings().weight.shape[0]
        for sample in samples:
            largest = max(sample.input_ids)
            if largest >= size:
                raise DataError(
                    f"{option}: sample {sample.id} has token id {largest}, the model's vocabulary ends at {size - 1}: "
                    f"give the model's own --tokenizer"
                )
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(samples, key=lambda sample: sample.num_tokens)
    if isinstance(positions, int) and 0 < positions < longest.num_tokens:
        raise DataError(
            f"{option}: sample {longest.id} has {longest.num_tokens} tokens, the model has {positions} positions; "
            f"give --max-length {positions} or less"
        )
