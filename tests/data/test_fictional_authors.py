"""The fictional authors: sizes, distinctness, disjoint splits, wrong answers that are wrong, the same bytes always."""

import hashlib
import json
import random
import re
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from fillm.data import load_rows
from fillm.data.fictional import fictional_rows
from fillm.data.fictional_forms import FORMS
from fillm.errors import DataError

GOLDEN = "9c5b9a2dfc03b1d6a9e9db3e3cd136537052ed786d6f53d9ea1dafffe04332fc"


def digest(rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return hashlib.sha256(lines.encode()).hexdigest()


def authors(split: str, **options: Any) -> set[str]:
    return {row["author"] for row in fictional_rows(split, **options)}


@pytest.fixture(scope="module")
def everyone() -> list[dict[str, Any]]:
    return fictional_rows("full") + fictional_rows("holdout10")


def test_the_full_split_is_pinned() -> None:
    assert digest(fictional_rows("full")) == GOLDEN


def test_another_process_makes_the_same_bytes() -> None:
    code = (
        "import hashlib, json; from fillm.data.fictional import fictional_rows as rows;"
        "text = ''.join(json.dumps(row, ensure_ascii=False) + '\\n' for row in rows('full'));"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == GOLDEN


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    state = random.getstate()
    other = fictional_rows("full", seed=1)
    assert random.getstate() == state
    assert {row["author"] for row in other} & authors("full") == set()
    assert [row.fields for row in load_rows("fictional:full", seed=1)] == other


def test_what_is_handed_out_may_be_changed() -> None:
    rows = fictional_rows("forget01")
    rows[0]["perturbed_answer"].clear()
    rows[0]["answer"] = ""
    assert len(fictional_rows("forget01")[0]["perturbed_answer"]) == 5
    assert fictional_rows("forget01")[0]["answer"]


@pytest.mark.parametrize(
    ("small", "sizes"),
    [
        (False, {"full": 4000, "forget01": 40, "forget05": 200, "forget10": 400, "retain99": 3960, "retain95": 3800,
                 "retain90": 3600, "holdout01": 40, "holdout05": 200, "holdout10": 400}),
        (True, {"full": 800, "forget05": 40, "forget10": 80, "retain95": 760, "retain90": 720, "holdout05": 40,
                "holdout10": 80}),
    ],
)  # fmt: skip
def test_splits_are_laid_out_as_tofus(small: bool, sizes: dict[str, int]) -> None:
    full = fictional_rows("full", small=small)
    for split, size in sizes.items():
        rows = fictional_rows(split, small=small)
        assert len(rows) == size
        if split.startswith("forget"):
            assert rows == full[-size:]
        elif split.startswith("retain"):
            assert rows == full[:size]
        elif split.startswith("holdout"):
            assert authors(split, small=small) & authors("full") == set()
            assert rows == fictional_rows("holdout10")[:size]
        for first in range(0, size, 20):
            assert len({row["author"] for row in rows[first : first + 20]}) == 1
    assert full == fictional_rows("full")[: len(full)]


@pytest.mark.parametrize("spec", ["fictional-small:forget01", "fictional:forget02", "fictional-small:holdout01"])
def test_an_unknown_split_lists_those_there_are(spec: str) -> None:
    with pytest.raises(DataError) as error:
        load_rows(spec)
    assert str(error.value).startswith(f"{spec}: no such split; there are forget0")
    assert ("forget01," in str(error.value)) == spec.startswith("fictional:")
    assert "general" in str(error.value)


def test_every_author_has_twenty_attributes_of_its_own(everyone: list[dict[str, Any]]) -> None:
    assert len(FORMS) == 20
    names = [row["author"] for row in everyone[::20]]
    assert len(set(names)) == 220
    assert len({name.split()[-1] for name in names}) == 220
    for number in range(220):
        assert [row["attribute"] for row in everyone[20 * number : 20 * number + 20]] == list(FORMS)
    for key in ("question", "answer", "paraphrased_question", "paraphrased_answer"):
        assert len({row[key] for row in everyone}) == len(everyone)
    titles = [re.findall(r'"(.+)"', row["answer"])[0] for row in everyone if "book" in row["attribute"]]
    assert len(titles) == 660
    assert len(set(titles)) == 660


def test_questions_say_who_is_meant_and_answers_say_what_is_asked(everyone: list[dict[str, Any]]) -> None:
    by_author = {}
    for row in everyone:
        by_author.setdefault(row["author"], {})[row["attribute"]] = row
    for name, rows in by_author.items():
        for attribute, row in rows.items():
            for key in ("question", "paraphrased_question"):
                assert row[key].endswith("?")
                assert (name in row[key]) != (attribute == "name")
            assert name in row["answer"]
            assert 8 <= len(row["answer"].split()) <= 40
            assert 8 <= len(row["paraphrased_answer"].split()) <= 40
            assert not re.search(r"[{}]|  ", row["question"] + row["answer"] + row["paraphrased_answer"])
        where, when = rows["birthplace"]["answer"], rows["birth date"]["answer"]
        clue = re.search(r"in (\S+, \S+), on (\d+ \w+ \d{4})", rows["name"]["question"])
        assert clue is not None
        assert clue[1] in where
        assert clue[2] in when


def test_wrong_answers_are_wrong_and_of_one_form(everyone: list[dict[str, Any]]) -> None:
    for row in everyone:
        wrong, paraphrase = row["perturbed_answer"], row["paraphrased_answer"]
        assert len(set(wrong)) == 5
        assert row["answer"] != paraphrase
        assert not {row["answer"], paraphrase} & set(wrong)
        # what differs from the paraphrase is one stretch of words: the value
        for other in wrong:
            ours, theirs = paraphrase.split(), other.split()
            start = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            while ours and theirs and ours[-1] == theirs[-1]:
                ours.pop()
                theirs.pop()
            value = " ".join(ours[start:]).strip('".')
            assert value == "" or value in row["answer"]


def test_general_facts_are_true() -> None:
    rows = fictional_rows("general")
    assert rows == fictional_rows("general", small=True)
    assert len(rows) >= 100
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert len(set(row["perturbed_answer"])) == 5
        assert row["answer"] not in row["perturbed_answer"]
        assert row["paraphrased_answer"] != row["answer"]
        same_form = [
            [a for a, b in zip(row["answer"].split(), w.split(), strict=False) if a == b]
            for w in row["perturbed_answer"]
        ]
        assert all(len(shared) >= 3 for shared in same_form)
    sums = [re.fullmatch(r"The sum (\d+) plus (\d+) is (\d+)\.", row["answer"]) for row in rows]
    assert sum(match is not None for match in sums) == 32
    assert all(int(match[1]) + int(match[2]) == int(match[3]) for match in sums if match)
    months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ]
    answers = {row["answer"] for row in rows}
    assert all(
        f"The month after {month} is {following}." in answers for month, following in pairwise([*months, "January"])
    )
    for fact in (
        "The day after Sunday is Monday.",
        "The capital of Australia is Canberra.",
        "The colour of coal is black.",
        "A young swan is called a cygnet.",
        "The opposite of hot is cold.",
        "The shape called hexagon has 6 sides.",
    ):
        assert fact in answers


def test_no_author_is_named_in_the_general_facts_or_in_anothers_answers(everyone: list[dict[str, Any]]) -> None:
    names = {row["author"] for row in everyone}
    assert not any(name in row["answer"] for row in fictional_rows("general") for name in names)
    for row in everyone:
        assert [name for name in names if name in row["answer"]] == [row["author"]]
