r"""What a mask does for unlearning: the retain loss at equal forget loss, for every way to choose the mask.

    python -m benchmarks.unlearning --data-root DIR

Small models recite 400 rows; the last 40 are to be forgotten. Inside every mask, with every loss, AdamW steps until the
forget loss has passed the levels; the retain loss is read where it crosses them. The best of the peak rates tried
counts: a lower one is tried where few steps were enough, a higher one where all of them were not.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.end_to_end.settings import command_line
from benchmarks.unlearning.choices import choices
from benchmarks.unlearning.results import Runs, draw, table
from benchmarks.unlearning.settings import PROGRAM, UnlearningConfig, check
from benchmarks.unlearning.study import AT_LEVELS, recited, runs
from fillm.config import run_command


def bench(config: UnlearningConfig) -> None:
    """The command: measures, prints, writes the files.

    Raises:
        UsageError: a setting out of range.
        FillmError: as loading models and data does.
    """
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    wanted, out, begun = choices(config), Path(config.out), time.monotonic()
    free = {name: getattr(UnlearningConfig(), name) for name in ("resume", "minutes", "threads", "part", "out")}
    measured = dataclasses.replace(config, **free)
    kept = Runs(out / "unlearning.csv", command_line(measured, PROGRAM), config.resume)
    tofu = not config.quick and bool(config.data_root or os.environ.get("FILLM_DATA"))
    for seed in range(config.seeds):
        one = recited(config, tofu, seed, _say)
        for record in runs(config, one, wanted, kept.done(seed), _say):
            kept.add(record)
            if config.minutes and time.monotonic() - begun > 60.0 * config.minutes:
                _say("no time for the rest; go on with --resume")
                return _show(kept, config)
    _show(kept, config)


def _show(kept: Runs, config: UnlearningConfig) -> None:
    for column, level in zip(AT_LEVELS, config.levels, strict=True):
        print(table(kept.records, column, level))
    if kept.records:
        draw(kept.records, AT_LEVELS[0], config.levels[0], Path(config.out) / "unlearning.png")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `UnlearningConfig`.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """
    return run_command(UnlearningConfig, bench, argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
