"""From what a command was given to samples: what is told of skipped rows, and whether the samples fit the model."""

from dataclasses import dataclass

import pytest
from torch import nn

from fillm.data import Reading, SampleSet, check_fits_model
from fillm.data.reading import skipped_lines
from fillm.data.templates import DEFAULT_TEMPLATE
from fillm.errors import DataError, UsageError
from tests.families import VOCAB_SIZE, build_family

GOOD = {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}
BAD = {"input_ids": [4, 5], "labels": [-100, -100]}


@dataclass(frozen=True)
class Settings:
    data_root: str | None = None
    template: str = DEFAULT_TEMPLATE
    max_length: int = 512
    skip_bad_rows: bool = True


def read(rows, **settings) -> tuple[SampleSet, list[str]]:
    told: list[str] = []
    reading = Reading(Settings(**settings), told.append)
    return reading.samples(reading.rows(rows, "--data"), None, "--data"), told


def test_nothing_is_told_where_nothing_is_skipped():
    samples, told = read([GOOD, GOOD])
    assert len(samples) == 2 and told == [] and skipped_lines([samples]) == []


@pytest.mark.parametrize("count", [1, 10])
def test_a_few_skipped_rows_are_all_listed_and_counted(count):
    samples, told = read([BAD] * count + [GOOD])
    why = "field 'labels' has no token that counts"
    assert told[:-1] == [f"skipped rows, row {number + 1}: {why}" for number in range(count)]
    assert told[-1] == f"--data: {count} of {count + 1} rows skipped"
    assert [f"skipped {line}" for line in skipped_lines([samples])] == told[:-1]


def test_of_many_skipped_rows_ten_are_listed_and_all_recorded():
    samples, told = read([BAD, GOOD] * 11)
    assert len(told) == 11 and len(skipped_lines([samples])) == 11
    assert told[-1].startswith("--data: 11 of 22 rows skipped; the first 10 are listed here, all in the run's record")
    assert skipped_lines([samples, samples]) == 2 * skipped_lines([samples])


def test_without_leave_to_skip_the_first_bad_row_is_an_error():
    with pytest.raises(DataError, match="rows, row 2: .*--skip-bad-rows"):
        read([GOOD, BAD], skip_bad_rows=False)


def test_data_that_are_not_given_are_named_by_their_option():
    with pytest.raises(UsageError, match="^--data is needed: a data spec such as"):
        read(None)


def test_the_settings_reach_the_rows():
    assert read([{"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]}], max_length=3)[0].lengths == [3]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_the_largest_token_id_and_the_longest_sample_that_fit(family):
    model = build_family(family)
    positions, last = model.config.max_position_embeddings, VOCAB_SIZE - 1
    whole, _ = read([GOOD, {"input_ids": [last] * positions, "labels": [-100] + [last] * (positions - 1)}])
    check_fits_model(whole, model, "--data")
    foreign, _ = read([GOOD, {"input_ids": [4, last + 1], "labels": [-100, last + 1]}])
    said = f"^--data: sample rows#1 has token id {last + 1}, the model's vocabulary ends at {last}: give .* --tokenizer"
    with pytest.raises(DataError, match=said):
        check_fits_model(foreign, model, "--data")
    long, _ = read([GOOD, {"input_ids": [4] * (positions + 1), "labels": [-100] + [4] * positions}])
    said = f"^--data: sample rows#1 has {positions + 1} tokens, the model has {positions} positions; give --max-length"
    with pytest.raises(DataError, match=said):
        check_fits_model(long, model, "--data")


def test_a_model_that_states_neither_is_taken_at_its_word():
    samples, _ = read([{"input_ids": [10**6] * 5000, "labels": [10**6] * 5000}], max_length=5000)
    check_fits_model(samples, nn.Linear(2, 2), "--data")
