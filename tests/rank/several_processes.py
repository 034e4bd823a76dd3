"""Runs the command several times under torchrun, with faults put in, joining the processes only once.

`-m tests.rank.several_processes JOBS.json OUT.json`; a job is `{"argv": [...]}`. Its `fault`, one of FAULTS, happens in
`process` (1) at the n-th `batch` (2) that this takes in a `pass` ("retain pass"), the first time that torchrun starts
it: `when` the batch begins ("before"), while it hands out gradients ("within") or once it is done ("after");
`further` arguments go to all but the first process. Losses above `overflow`, where a step is too long for the numbers
of a larger model, are infinite in passes for losses alone. OUT.json has by job the exit code of every process; without
it the first job alone runs, and the process ends as the command does.
"""

import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch

from fillm.rank import path_step
from fillm.rank.__main__ import main
from fillm.rank.passes import Passes
from fillm.runs import RunFolder
from fillm.statistics import retain
from tests.runs.jobs import FAULTS, code_of, is_here, serve

SMALL_TENSOR = 64  # above, tensors are summed without the higher terms, and near orthogonal samples are left out


class Faulty:
    """A statistic that goes wrong at the first tensor."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def observe(self, *_: Any) -> None:
        FAULTS[self.fault](())


def overflowing(above: float) -> Any:
    """`sample_losses` of the passes that compute losses alone, with infinity above a value."""
    real = path_step.sample_losses

    def losses(*given: Any) -> torch.Tensor:
        found = real(*given)
        return found.masked_fill(found > above, torch.inf)

    return mock.patch.object(path_step, "sample_losses", losses)


def run(job: Mapping[str, Any]) -> int:
    """The exit code of one job in this process."""
    batch, begin, save, now = Passes._batch, Passes.run, RunFolder.save_state, {"label": "", "batches": 0}

    def begun(self: Passes, stage: str, label: str, *given: Any, **options: Any) -> None:
        now.update(label=label, batches=0)
        begin(self, stage, label, *given, **options)

    def counted(self: Passes, capture: Any, samples: Any, members: list[int], statistic: Any) -> torch.Tensor:
        now["batches"] += 1
        due = now["label"] == job.get("pass", "retain pass") and now["batches"] == job.get("batch", 2)
        when = job.get("when", "before") if due else ""
        if when == "before":
            FAULTS[job["fault"]](())
        losses = batch(self, capture, samples, members, Faulty(job["fault"]) if when == "within" else statistic)
        if when == "after":
            FAULTS[job["fault"]](())
        return losses

    def full(*given: Any) -> None:
        FAULTS["disk"](given)

    Passes.run = begun
    if is_here(job) and job["fault"] == "disk":
        RunFolder.save_state = full
    elif is_here(job):
        Passes._batch = counted
    try:
        with overflowing(job.get("overflow", torch.inf)):
            return code_of(main, job)
    finally:
        Passes._batch, Passes.run, RunFolder.save_state = batch, begin, save


if __name__ == "__main__":
    retain.EXPANSION_NUMEL = SMALL_TENSOR
    serve(run, *sys.argv[1:])
