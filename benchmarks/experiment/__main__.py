r"""One of the studies behind the method, over small models or on one of yours.

    python -m benchmarks.experiment layer_robustness
    python -m benchmarks.experiment layer_robustness --model ID --device cuda --forget SPEC --retain SPEC

Every experiment is a file of benchmarks/experiments: what was claimed and where, the models, the data, the study's
settings.
`docs/studies.md` says what came out.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end.settings import command_line
from benchmarks.experiment.case import FAMILIES, cases
from benchmarks.experiment.results import Rows
from benchmarks.experiment.settings import FREE, PROGRAM, ExperimentConfig, Plan, read_plan
from fillm.config import run_command
from fillm.errors import UsageError


def bench(config: ExperimentConfig) -> None:
    """The command: measures, prints, writes the files.

    Raises:
        UsageError: a setting out of range, or an experiment that there is not.
        FillmError: as loading models and data does.
    """
    plan, begun = read_plan(config, FAMILIES), time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    study = importlib.import_module(f"benchmarks.experiment.studies.{plan.study}")
    settings = _settings(plan, study)
    free = {name: getattr(ExperimentConfig(), name) for name in FREE}
    command = command_line(dataclasses.replace(config, experiment=(), **free), f"{PROGRAM} {config.name}")
    path = Path(config.out) / f"{config.name}.csv"
    rows = Rows(path, study.COLUMNS, command, config.resume)
    for case in cases(config, plan, _say):
        for record in study.records(case, settings, rows.of(case.family, case.seed)):
            rows.add(record)
            told = ", ".join(str(record[name]) for name in study.KEY)
            _say(f"{case.family} {case.seed}: {told}")
            if config.minutes and time.monotonic() - begun > 60.0 * config.minutes:
                _say("no time for the rest; go on with --resume")
                return _show(study, rows, plan, path)
    _show(study, rows, plan, path)


def _settings(plan: Plan, study: Any) -> dict[str, Any]:
    unknown = sorted(set(plan.settings) - set(study.DEFAULTS))
    if unknown:
        raise UsageError(f"{plan.study} has no setting {', '.join(unknown)}; it takes {', '.join(study.DEFAULTS)}")
    return {**study.DEFAULTS, **plan.settings}


def _show(study: Any, rows: Rows, plan: Plan, path: Path) -> None:
    if rows.records:
        print(f"{plan.title}\n\nclaim: {plan.claim}\nsource: {plan.source}\n")
        print(study.summary(rows.records))
        study.draw(rows.records, path.with_suffix(".png"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `ExperimentConfig`.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """
    return run_command(ExperimentConfig, bench, argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
