r"""Unlearned models beside the model that never saw the forget set, over methods, masks and seeds.

    python -m benchmarks.forget_quality --data-root DIR

A small model recites 400 rows, of which the last 40 are to be forgotten; another one was trained the same way on the
other 360 alone. Inside every mask, with every loss, the first unlearns until its loss on the forget rows is one number.
What it says then is scored by the metrics of TOFU, Forget Quality against the second.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.end_to_end.settings import command_line
from benchmarks.forget_quality.models import Pair, pair
from benchmarks.forget_quality.results import COLUMNS, table
from benchmarks.forget_quality.settings import PROGRAM, ForgetQualityConfig, check
from benchmarks.forget_quality.study import compared
from benchmarks.unlearning.results import Runs
from fillm.config import run_command


def bench(config: ForgetQualityConfig) -> None:
    """The command: measures, prints, writes the file.

    Raises:
        UsageError: a setting out of range.
        FillmError: as loading models and data does.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    begun = time.monotonic()
    free = {name: getattr(ForgetQualityConfig(), name) for name in ("resume", "minutes", "threads", "part", "out")}
    measured = dataclasses.replace(config, **free)
    path = Path(config.out) / "forget_quality.csv"
    kept = Runs(path, command_line(measured, PROGRAM), config.resume, COLUMNS)
    tofu = not config.quick and bool(config.data_root or os.environ.get("FILLM_DATA"))
    pairs: dict[int, Pair] = {}

    def made(seed: int) -> Pair:
        if seed not in pairs:
            pairs[seed] = pair(config, tofu, seed, _say)
        return pairs[seed]

    for seed in range(config.seeds):
        done = {(record["choice"], record["loss"]) for record in kept.done(seed)}
        other = partial(made, (seed + 1) % config.seeds) if config.seeds > 1 else None
        for record in compared(config, made(seed), other, done, _say):
            kept.add(record)
            if config.minutes and time.monotonic() - begun > 60.0 * config.minutes:
                _say("no time for the rest; go on with --resume")
                print(table(kept.records))
                return
    print(table(kept.records))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `ForgetQualityConfig`.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """
    return run_command(ForgetQualityConfig, bench, argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
