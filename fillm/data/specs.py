"""Reads a data spec: which data set, which split, which slice. Opens nothing."""

import re
from dataclasses import dataclass

from fillm.errors import DataError

BENCHMARKS = ("fictional", "fictional-small", "tofu", "knowundo")
FILE_EXTENSIONS = (".json", ".jsonl", ".csv", ".parquet")

_SLICE = re.compile(r"(?P<base>.*)\[(?P<inside>[^\[\]]*)\]", re.DOTALL)
_BOUND = re.compile(r"\s*(-?[0-9]+)?\s*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[A-Za-z0-9][A-Za-z0-9_-]*)*")
_HUB_NAME = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class DataSpec:
    """A parsed data spec.

    Attributes:
        kind: one of `BENCHMARKS`, `file` or `hub`.
        name: the split of a benchmark, the path of a file, `owner/name` of a Hub data set.
        base: the spec without its slice; rows carry it as their source.
        bounds: start and stop of the slice as in Python; None without a slice.
        config: configuration of a Hub data set, None for its default.
        split: split of a Hub data set, None for its only one.
    """

    kind: str
    name: str
    base: str
    bounds: tuple[int | None, int | None] | None = None
    config: str | None = None
    split: str | None = None

    def cut(self, count: int) -> range:
        """Positions of the `count` rows that the slice keeps, as Python's `[start:stop]` would.

        Raises:
            DataError: if the slice keeps none.
        """
        if self.bounds is None:
            return range(count)
        kept = range(count)[slice(*self.bounds)]
        if not kept:
            start, stop = ("" if bound is None else bound for bound in self.bounds)
            raise DataError(f"{self.base}[{start}:{stop}]: the slice is empty; {self.base} has {count} rows")
        return kept


def _split_off_slice(text: str) -> tuple[str, tuple[int | None, int | None] | None]:
    match = _SLICE.fullmatch(text)
    if match is None:
        return text, None
    bounds = [_BOUND.fullmatch(part) for part in match["inside"].split(":")]
    if len(bounds) != 2 or None in bounds:
        raise DataError(
            f"{text}: [{match['inside']}] is not a slice; write [start:stop] with whole numbers, either may be left out"
        )
    start, stop = (int(bound[1]) if bound and bound[1] else None for bound in bounds)
    return match["base"], (start, stop)


def parse_spec(text: str) -> DataSpec:
    """Parses `fictional:forget05`, `tofu:full[3600:3960]`, `rows.jsonl[:100]`, `hub:owner/name:config:split`, ...

    Source: docs/data.md.

    Raises:
        DataError: if it is none of the forms, or the slice is not one.
    """
    base, bounds = _split_off_slice(text.strip())
    if base.lower().endswith(FILE_EXTENSIONS):
        return DataSpec("file", base, base, bounds)
    kind, colon, name = base.partition(":")
    if kind in BENCHMARKS:
        if not _NAME.fullmatch(name):
            raise DataError(f"{text}: name a split after '{kind}:', such as {kind}:{_EXAMPLES[kind]}")
        return DataSpec(kind, name, base, bounds)
    if kind == "hub" and colon:
        parts = name.split(":")
        if len(parts) > 3 or not _HUB_NAME.fullmatch(parts[0]):
            raise DataError(f"{text}: a Hub data set is written hub:owner/name, hub:owner/name:config or :config:split")
        config, split = (part or None for part in (*parts[1:], "", "")[:2])
        return DataSpec("hub", parts[0], base, bounds, config, split)
    raise DataError(
        f"{text or repr(text)}: not a data spec; give a path that ends in {', '.join(FILE_EXTENSIONS)}, "
        f"or {', '.join(f'{known}:SPLIT' for known in BENCHMARKS)}, or hub:owner/name"
    )


_EXAMPLES = {
    "fictional": "forget05",
    "fictional-small": "forget05",
    "tofu": "forget01",
    "knowundo": "privacy/unlearn_train",
}
