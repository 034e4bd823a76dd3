"""What figures of a study are called, and what they say of it."""

import itertools
import re
from collections.abc import Sequence

from fillm.report.runs import Run

_LONGEST = 80  # characters of a name
STUDENT = "Bars: 95 % interval of the mean over models by Student's t."


def stems(runs: Sequence[Run]) -> list[str]:
    """A name for the files of each, of letters, digits and underscores; a name that is taken gets a number."""
    found: list[str] = []
    for run in runs:
        bare = run.name.removesuffix(".csv").removesuffix(".parquet")
        plain = re.sub(r"\W+", "_", bare, flags=re.ASCII).strip("_").lower()[:_LONGEST] or "study"
        numbered = (f"{plain}_{number}" for number in itertools.count(2))
        found.append(plain if plain not in found else next(name for name in numbered if name not in found))
    return found


def claim_of(run: Run) -> str:
    """A sentence or two; empty where nothing is known of a claim."""
    if not (claim := run.study.get("claim")):
        return ""
    source = run.study.get("source")
    return f"What was claimed: {claim}{f' Source: {source}' if source else ''}"
