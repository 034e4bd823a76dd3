"""Other answers to the forget questions: refusals, one drawn for every sample."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace

from fillm.data import Row, SampleSet
from fillm.documents import read_text
from fillm.errors import DataError
from fillm.paths import expanded

REFUSALS: tuple[str, ...] = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm not sure.",
    "I have no information about that.",
    "I can't tell you that, because I don't know it.",
    "That is not something I know.",
    "I'm afraid I have no answer to this question.",
    "I couldn't say.",
    "Sorry, I don't know anything about this.",
    "I have never come across this.",
    "I'm unable to answer that question.",
    "This is outside of what I know.",
    "I don't have the answer.",
    "I wish I could help, but I don't know.",
    "My knowledge does not reach that far.",
    "I'm not familiar with this subject.",
    "I have nothing to say about this.",
    "I would only be guessing.",
    "I can't answer this one.",
    "I'm sorry, that is unknown to me.",
    "Nothing I have learned covers this.",
    "I don't have any details about that.",
    "You would have to ask somebody else; I don't know.",
    "I have no idea.",
    "I can't recall anything of the kind.",
    "I'm not the one to ask about this.",
    "There is nothing about this that I could tell you.",
    "I'm not aware of that.",
    "I lack the information to answer.",
    "I really don't know.",
)

_ANSWER_OF = {"question": "answer", "text": "labels"}  # fields of a row: what is asked, what is answered


def read_refusals(path: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """The answers of a text file, one a line, blank lines left out; without a file, the built-in ones.

    Raises:
        DataError: if the file cannot be read or holds no line.
    """
    if path is None:
        return REFUSALS
    try:
        lines = read_text(expanded(path)).splitlines()
    except OSError as error:
        raise DataError(f"--idk {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--idk {path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise DataError(f"--idk {path}: {error}; write one answer a line") from None
    if not (found := tuple(line.strip() for line in lines if line.strip())):
        raise DataError(f"--idk {path}: holds no line; write one answer a line")
    return found


def with_refusals(rows: Sequence[Row], samples: SampleSet, refusals: Sequence[str], seed: int) -> list[Row]:
    """Rows with the questions of some samples and a refusal for an answer.

    Which refusal a sample gets depends on the seed and its id alone: not on the samples beside it, nor on the epoch.

    Args:
        rows: what the samples were made from, or more.
        samples: the forget set.
        refusals: the answers to draw from.
        seed: of the draw.

    Returns:
        One row a sample, in their order; tokenise them as `rows` were.

    Raises:
        DataError: naming the first row that asks nothing that could be answered otherwise.
    """
    by_id = {row.id: row for row in rows}
    changed = []
    for sample in samples:
        row = by_id[sample.id]
        asked = next((field for field in _ANSWER_OF if field in row.fields), None)
        if "input_ids" in row.fields or asked is None or _ANSWER_OF[asked] not in row.fields:
            raise DataError(
                f"{row.where}: has no question to answer otherwise; --loss idk and dpo need rows with question + "
                "answer or text + labels"
            )
        refusal = random.Random(f"{seed}:{row.id}").choice(refusals)
        changed.append(replace(row, fields={**row.fields, _ANSWER_OF[asked]: refusal}))
    return changed
