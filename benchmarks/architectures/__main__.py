"""Ranks every causal-LM architecture of the installed transformers, small, and writes what came of it.

python -m benchmarks.architectures [--only TYPE,...] [--part I/N] [--out CSV]
python -m benchmarks.architectures --page

With --only or --part, lines of other architectures stay as they are in the file. --page writes docs/models.md from it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.architectures.page import PAGE, page
from benchmarks.architectures.results import RESULTS, read, write
from benchmarks.architectures.small import causal_lm_types
from benchmarks.architectures.walk import walk
from benchmarks.part import check_part, part_of
from fillm.errors import UsageError


def main(argv: Sequence[str] | None = None) -> None:
    """The command; a wrong use is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="benchmarks.architectures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="model types, with commas between them")
    parser.add_argument("--part", help="I/N: every Nth architecture from the Ith")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV")
    parser.add_argument("--page", action="store_true", help="write docs/models.md from the CSV, walk nothing")
    options = parser.parse_args(argv)
    try:
        check_part(options.part)
        if options.page:
            PAGE.write_text(page(read(options.out)), encoding="utf-8")
            return
        chosen = part_of(_chosen(options.only), options.part)
    except UsageError as error:
        raise SystemExit(f"benchmarks.architectures: {error}") from None
    kept = {}
    if (options.only or options.part) and options.out.exists():
        kept = {record["model_type"]: record for record in read(options.out)}
    for record in walk(chosen):
        print(
            f"{record['model_type']:28} {record['outcome']:14} {record['largest_error']:8} {record['reason']}",
            flush=True,
        )
        kept[record["model_type"]] = record
        write(options.out, kept.values())


def _chosen(only: str | None) -> list[str]:
    every = causal_lm_types()
    if only is None:
        return every
    wanted = only.split(",")
    if unknown := sorted(set(wanted) - set(every)):
        raise UsageError(f"--only {unknown[0]}: the installed transformers has no such causal language model")
    return wanted


if __name__ == "__main__":
    main(sys.argv[1:])
