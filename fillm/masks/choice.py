"""What is selected from a ranking: its best or its last part, a band of it, or what stands above a score.

A ranking's units (tensors, rows, heads, single weights) stand in an order, best first. `top` takes them from the front,
`bottom` from the end, a band from a place to another; each place is a fraction of all weights, or of all tensors. A
unit that would go past the place is left out with all behind it, but at least one unit is taken.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from fillm.errors import UsageError

SIDES, MEASURES = ("top", "bottom"), ("parameters", "tensors")
_NUMBER = r"\d*\.?\d+(?:[eE][+-]?\d+)?"
_BAND = re.compile(f"({_NUMBER})-({_NUMBER})")
_GRAMMAR = (
    "give top:FRACTION, bottom:FRACTION or band:LOW-HIGH, each with :parameters or :tensors and with :proportional "
    "behind it if wanted, or above:SCORE"
)


@dataclass(frozen=True)
class Choice:
    """A checked choice; make it with `make_choice`.

    Attributes:
        side: `top`, `bottom`, `band` or `above`.
        begin, end: places as fractions of the order (of its reverse for `bottom`), exactly as they are written.
        of: `parameters` or `tensors`, what the fractions are of.
        proportional: the same part of every kind, each ordered by itself.
        above: the score, for `above`.
        include, exclude: kinds and globs on names.
    """

    side: str
    begin: Fraction = Fraction(0)
    end: Fraction = Fraction(1)
    of: str = "parameters"
    proportional: bool = False
    above: float = 0.0
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    @property
    def text(self) -> str:
        """As `parse_select` reads it, globs apart."""
        if self.side == "above":
            return f"above:{self.above!r}"
        places = f"{float(self.begin)!r}-{float(self.end)!r}" if self.side == "band" else f"{float(self.end)!r}"
        return f"{self.side}:{places}:{self.of}" + (":proportional" if self.proportional else "")


def make_choice(
    fraction: float | None = None,
    side: str | None = None,
    of: str = "parameters",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    proportional: bool = False,
    band: tuple[float, float] | None = None,
    above: float | None = None,
) -> Choice:
    """A choice from the arguments of `Ranking.select`, which explains them.

    Raises:
        UsageError: naming the argument that cannot be, or has no effect beside the others.
    """
    given = {"fraction": fraction, "side": side, "band": band, "above": above}
    if band is not None or above is not None:
        name = "band" if band is not None else "above"
        for other, value in given.items():
            if other != name and value is not None:
                raise UsageError(f"select: {other} has no effect beside {name}; give one of them")
    if of not in MEASURES:
        raise UsageError(f"select: of={of!r} is none of {', '.join(MEASURES)}")
    patterns = {"include": include, "exclude": exclude}
    if above is not None:
        if of != "parameters" or proportional:
            raise UsageError("select: of and proportional have no effect beside above; leave them out")
        if not math.isfinite(above):
            raise UsageError(f"select: above={above} must be finite")
        return Choice("above", above=float(above), **patterns)
    if band is not None:
        begin, end = (_exact(value, "band") for value in band)
        if not 0 <= begin < end <= 1:
            raise UsageError(f"select: band={band[0]}-{band[1]} must rise, from 0 or more to 1 at most")
        return Choice("band", begin, end, of, proportional, **patterns)
    side, fraction = side or SIDES[0], 0.1 if fraction is None else fraction
    if side not in SIDES:
        raise UsageError(f"select: side={side!r} is none of {', '.join(SIDES)}")
    if not 0 < _exact(fraction, "fraction") <= 1:
        raise UsageError(f"select: fraction={fraction} must be above 0 and 1 at most")
    return Choice(side, Fraction(0), _exact(fraction, "fraction"), of, proportional, **patterns)


def _exact(value: float, name: str) -> Fraction:
    """The number as it is written: 0.29 of 100 is 29, which the nearest binary number would miss."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"select: {name}={value!r} is no number")
    return Fraction(repr(float(value)))


def parse_select(text: str) -> dict[str, Any]:
    """The arguments of `Ranking.select` that a text stands for, as after `--select`.

    `top:0.1`, `bottom:0.25:tensors`, `top:0.1:parameters:proportional`, `band:0.1-0.3`, `above:0.5`.

    Raises:
        UsageError: for any other text.
    """
    kind, *parts = [part.strip() for part in text.split(":")]
    try:
        if kind not in (*SIDES, "band", "above") or not parts:
            raise ValueError
        value, further = parts[0], parts[1:]
        arguments: dict[str, Any] = {}
        if kind == "band":
            if (found := _BAND.fullmatch(value)) is None:
                raise ValueError
            arguments["band"] = (float(found[1]), float(found[2]))
        elif kind == "above":
            arguments["above"] = float(value)
        else:
            arguments |= {"side": kind, "fraction": float(value)}
        if kind != "above" and further and further[0] in MEASURES:
            arguments["of"] = further.pop(0)
        if kind != "above" and further == ["proportional"]:
            arguments["proportional"] = bool(further.pop())
        if further:
            raise ValueError
    except ValueError:
        raise UsageError(f"--select {text}: {_GRAMMAR}") from None
    try:
        make_choice(**arguments)
    except UsageError as error:
        raise UsageError(f"--select {text}: {str(error).removeprefix('select: ')}") from None
    return arguments


def chosen_units(
    choice: Choice,
    sizes: np.ndarray,
    unused: np.ndarray,
    scores: np.ndarray,
    kinds: Sequence[str],
    ascending: bool,
) -> np.ndarray:
    """Which units a choice takes.

    Args:
        choice: the choice; its patterns have been applied.
        sizes: weights of every unit in the order of the ranking, [n], int64.
        unused: units that no gradient reaches, [n], bool: the last of the order, taken from the end alone.
        scores: [n], float64.
        kinds: of the units' tensors, n of them.
        ascending: whether the smallest score stands first.

    Returns:
        [n], bool.

    Raises:
        UsageError: if it takes none.
    """
    chosen = np.zeros(len(sizes), dtype=bool)
    if choice.side == "above":
        chosen[:] = (scores < choice.above if ascending else scores > choice.above) & ~unused
    else:
        named = np.array(kinds, dtype=object)
        groups = (
            [named == kind for kind in dict.fromkeys(kinds)] if choice.proportional else [np.full(len(sizes), True)]
        )
        for group in groups:
            places = group.nonzero()[0]
            chosen[places[_taken(choice, sizes[places])]] = True
        if choice.side != "bottom":
            chosen &= ~unused
    if not chosen.any():
        raise UsageError(
            f"select {choice.text}: selects nothing of {len(sizes)} units, {int(unused.sum())} of them unused"
        )
    return chosen


def _taken(choice: Choice, sizes: np.ndarray) -> slice:
    """The part of an order of units that a choice of places takes."""
    measured = sizes if choice.of == "parameters" else np.ones_like(sizes)
    if choice.side == "bottom":
        measured = measured[::-1]
    sums = measured.cumsum()
    begin, end = (
        int(np.searchsorted(sums, budget(place, int(sums[-1])), side="right")) for place in (choice.begin, choice.end)
    )
    end = max(end, begin + 1)
    return slice(len(sizes) - end, None) if choice.side == "bottom" else slice(begin, end)


def budget(place: Fraction, total: int) -> int:
    """How many of `total` lie before a place."""
    return math.floor(place * total)
