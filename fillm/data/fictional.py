"""The fictional authors: a seeded generator of questions and answers about people who do not exist.

Laid out as TOFU (Maini et al. 2024, arXiv 2401.06121): 200 authors with 20 rows each, the last of them to be forgotten,
plus authors that are in no training split. Every choice is a sha256 of (seed, label), so the rows are the same bytes
on every machine and Python version.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from fillm.data import fictional_words as w
from fillm.data.fictional_facts import WRONG_ANSWERS, general_rows
from fillm.data.fictional_forms import FORMS
from fillm.errors import DataError

NUM_AUTHORS = 200
NUM_SMALL_AUTHORS = 40
NUM_HOLDOUT_AUTHORS = 20
ROWS_PER_AUTHOR = len(FORMS)

_BIRTH_YEARS = range(1921, 1976)
_SPARE = 60  # values nobody has, so that wrong answers are not all true of somebody else


class _Draw:
    """Choices that depend on nothing but the seed and their label."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def number(self, label: str) -> int:
        """A number below 2^64, as good as uniform."""
        digest = hashlib.sha256(f"fictional authors/{self._seed}/{label}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def one(self, label: str, options: Sequence[str]) -> str:
        """One option."""
        return options[self.number(label) % len(options)]

    def some(self, label: str, options: Sequence[str], count: int) -> list[str]:
        """`count` options at different positions, in random order."""
        order = sorted(range(len(options)), key=lambda i: (self.number(f"{label}/{i}"), i))
        return [options[i] for i in order[:count]]


class _Values:
    """The attributes of every author, and wrong values for them."""

    def __init__(self, draw: _Draw) -> None:
        self._draw = draw
        count = NUM_AUTHORS + NUM_HOLDOUT_AUTHORS + _SPARE
        families = [start + end for start, end in product(w.FAMILY_STARTS, w.FAMILY_ENDS)]
        names = [
            f"{draw.one(f'given/{family}', w.GIVEN_NAMES)} {family}"
            for family in draw.some("family", families, len(families))
        ]
        places = [
            f"{start}{end}, {draw.one(f'province/{start}{end}', w.PROVINCES)}"
            for start, end in product(w.TOWN_STARTS, w.TOWN_ENDS)
        ]
        dates = [f"{day} {month} {year}" for year, month, day in product(_BIRTH_YEARS, w.MONTHS, range(1, 29))]
        first = [f"The {adjective} {noun}" for adjective, noun in product(w.TITLE_ADJECTIVES, w.TITLE_NOUNS)]
        famous = [f"The {a} {b} the {c}" for a, b, c in product(w.TITLE_NOUNS, w.TITLE_VERBS, w.TITLE_PLACES)]
        latest = [f"{a} of the {b} {c}" for a, b, c in product(w.TITLE_PLACES, w.TITLE_ADJECTIVES, w.TITLE_NOUNS)]
        # author i has entry i, and nobody else has it
        self._own = {
            "name": names[:count],
            "birthplace": draw.some("birthplace", places, count),
            "birth date": draw.some("birth date", dates, count),
            "first book": draw.some("first book", first, count),
            "best-known book": draw.some("best-known book", famous, count),
            "latest book": draw.some("latest book", latest, count),
        }
        self._lists = {
            "genre": w.GENRES,
            "father": w.PROFESSIONS,
            "mother": w.PROFESSIONS,
            "first job": w.PROFESSIONS,
            "subject": w.SUBJECTS,
            "influence": names[count:],  # writers who are named, but have no rows
            "language": w.LANGUAGES,
            "residence": self._own["birthplace"],
            "hobby": w.HOBBIES,
        }

    def of(self, author: int) -> dict[str, str]:
        """All attributes of one author."""
        values = {attribute: entries[author] for attribute, entries in self._own.items()}
        work = self._draw.some(f"{author}/trades", w.PROFESSIONS, 3)
        values |= dict(zip(("father", "mother", "first job"), work, strict=True))
        born = int(values["birth date"][-4:])
        for attribute in FORMS:
            if attribute not in values:
                values[attribute] = self._roll(attribute, f"{author}/{attribute}", born)
        if values["residence"] == values["birthplace"]:
            values["residence"] = self._own["birthplace"][-1 - author % _SPARE]
        return values

    def wrong(self, author: int, attribute: str, values: dict[str, str]) -> list[str]:
        """Values of one attribute that are not this author's, all different."""
        born, found, attempt = int(values["birth date"][-4:]), [values[attribute]], 0
        while len(found) <= WRONG_ANSWERS:
            value = self._roll(attribute, f"{author}/{attribute}/wrong/{attempt}", born)
            attempt += 1
            if value not in found:
                found.append(value)
        return found[1:]

    def _roll(self, attribute: str, label: str, born: int) -> str:
        def one(part: str, options: Sequence[str]) -> str:
            return self._draw.one(f"{label}/{part}", options)

        if attribute == "award":
            year = born + 25 + self._draw.number(f"{label}/year") % 21
            return f"{one('name', w.AWARD_NAMES)} {one('kind', w.AWARD_KINDS)} in {year}"
        if attribute == "school":
            town = one("start", w.TOWN_STARTS) + one("end", w.TOWN_ENDS)
            return f"{town} {one('kind', w.SCHOOL_KINDS)}"
        if attribute == "themes":
            return " and ".join(self._draw.some(label, w.THEMES, 2))
        if attribute == "pet":
            return f"{one('animal', w.PETS)} named {one('name', w.PET_NAMES)}"
        if attribute == "writing place":
            return f"{one('desk', w.DESKS)} {one('hour', w.HOURS)}"
        return one("value", self._own.get(attribute) or self._lists[attribute])


def _author_rows(draw: _Draw, values: _Values, author: int) -> list[dict[str, Any]]:
    facts = values.of(author)
    rows = []
    for attribute, forms in FORMS.items():
        place, date = facts["birthplace"], facts["birth date"]
        known = {"name": facts["name"], "family": facts["name"].split()[-1], "clue": f"in {place}, on {date}"}
        label = f"{author}/{attribute}/form"
        answer, paraphrase = draw.one(f"{label}/a", forms.answers), draw.one(f"{label}/p", forms.paraphrases)
        value = facts[attribute]
        rows.append(
            {
                "question": draw.one(f"{label}/q", forms.questions).format(**known),
                "answer": answer.format(value=value, **known),
                "paraphrased_question": draw.one(f"{label}/r", forms.rephrased).format(**known),
                "paraphrased_answer": paraphrase.format(value=value, **known),
                "perturbed_answer": [
                    paraphrase.format(value=wrong, **known) for wrong in values.wrong(author, attribute, facts)
                ],
                "author": facts["name"],
                "attribute": attribute,
            }
        )
    return rows


@lru_cache(maxsize=2)
def _library(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of all authors, the holdout's last, and the general facts."""
    draw = _Draw(seed)
    values = _Values(draw)
    everyone = range(NUM_AUTHORS + NUM_HOLDOUT_AUTHORS)
    return [row for author in everyone for row in _author_rows(draw, values, author)], general_rows(draw.some)


def _author_splits(small: bool) -> dict[str, range]:
    """Which authors each split holds."""
    count, percentages = (NUM_SMALL_AUTHORS, (5, 10)) if small else (NUM_AUTHORS, (1, 5, 10))
    splits = {"full": range(count)}
    for percent in percentages:
        forgotten = count * percent // 100
        splits[f"forget{percent:02d}"] = range(count - forgotten, count)
        splits[f"retain{100 - percent}"] = range(count - forgotten)
        splits[f"holdout{percent:02d}"] = range(NUM_AUTHORS, NUM_AUTHORS + forgotten)
    return splits


def fictional_rows(split: str, *, seed: int = 0, small: bool = False) -> list[dict[str, Any]]:
    """The rows of one split, 20 an author.

    Args:
        split: `full`, `forget01|05|10`, `retain99|95|90`, `holdout01|05|10` (in no training split) or `general` (true
            facts as a control).
        seed: which authors; a model knows those of the seed it was trained on only.
        small: the first 40 authors instead of all 200; without the splits of one percent.

    Returns:
        Rows with `question`, `answer`, `paraphrased_question`, `paraphrased_answer`, `perturbed_answer` (five, in the
        form of the paraphrase; for `general` in the form of the answer), `attribute`, and but for `general` `author`.

    Raises:
        DataError: if there is no such split.
    """
    splits = _author_splits(small)
    if split != "general" and split not in splits:
        kind = "fictional-small" if small else "fictional"
        raise DataError(f"{kind}:{split}: no such split; there are {', '.join(sorted([*splits, 'general']))}")
    by_author, general = _library(seed)
    rows = general
    if split != "general":
        authors = splits[split]
        rows = by_author[authors.start * ROWS_PER_AUTHOR : authors.stop * ROWS_PER_AUTHOR]
    return [{**row, "perturbed_answer": list(row["perturbed_answer"])} for row in rows]
