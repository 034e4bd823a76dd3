"""Runs the command several times under torchrun, with faults put in, joining the processes only once.

`-m tests.rank.several_processes JOBS.json OUT.json`; a job is `{"argv": [...]}`. Its `fault`, one of FAULTS, happens in
`process` (1) at the n-th `batch` (2) that this takes in a `pass` ("retain pass"), the first time that torchrun starts
it: `when` the batch begins ("before"), while it hands out gradients ("within") or once it is done ("after");
`further` arguments go to all but the first process. OUT.json holds, by job, the exit code of every process. Without
OUT.json the first job alone runs, and the process ends as the command does.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fillm.config import leave
from fillm.errors import NumericsError, RunFolderError
from fillm.rank import dealing, ranking_files
from fillm.rank.__main__ import main
from fillm.rank.passes import Passes
from fillm.runs import RunFolder, processes
from fillm.statistics import retain

SMALL_TENSOR = 64  # above, tensors are summed without the higher terms, and near orthogonal samples are left out


def _refuse() -> None:
    raise NumericsError("the loss of sample 7 is nan")


def _break() -> None:
    raise ZeroDivisionError("a fault of ours")


FAULTS: dict[str, Callable[[], None]] = {
    "error": _refuse,
    "bug": _break,
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Faulty:
    """A statistic that goes wrong at the first tensor."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def observe(self, *_: Any) -> None:
        FAULTS[self.fault]()


def run(job: dict[str, Any]) -> int:
    """The exit code of one job in this process; of an exception, that of the interpreter."""
    batch, begin, save, now = Passes._batch, Passes.run, RunFolder.save_state, {"label": "", "batches": 0}

    def begun(self: Passes, stage: str, label: str, *given: Any, **options: Any) -> None:
        now.update(label=label, batches=0)
        begin(self, stage, label, *given, **options)

    def counted(self: Passes, capture: Any, samples: Any, members: list[int], statistic: Any) -> torch.Tensor:
        now["batches"] += 1
        due = now["label"] == job.get("pass", "retain pass") and now["batches"] == job.get("batch", 2)
        when = job.get("when", "before") if due else ""
        if when == "before":
            FAULTS[job["fault"]]()
        losses = batch(self, capture, samples, members, Faulty(job["fault"]) if when == "within" else statistic)
        if when == "after":
            FAULTS[job["fault"]]()
        return losses

    def full(*_: Any) -> None:
        raise RunFolderError("no space left on the disk")

    Passes.run = begun
    process, again = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if job.get("fault") in FAULTS and job.get("process", 1) == process and not again:
        Passes._batch = counted
    if job.get("fault") == "disk":
        RunFolder.save_state = full
    try:
        return main([*job["argv"], *(job.get("further", []) if process else [])])
    except ZeroDivisionError as error:
        print(f"Fault of ours: {error}", file=sys.stderr)
        return 1
    finally:
        Passes._batch, Passes.run, RunFolder.save_state = batch, begin, save


if __name__ == "__main__":
    torch.set_num_threads(1)
    retain.EXPANSION_NUMEL = SMALL_TENSOR
    processes._BLOCK = 1000  # several to a tensor, and one that is not full
    ranking_files.score_heatmap = lambda *given, **options: None
    jobs, told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), []
    if len(sys.argv) == 2:
        dealing.MEETING_SECONDS = 0.0
        leave(run(jobs[0]))
    processes.Processes._disband = lambda self, done: None
    for number, given in enumerate(jobs):
        # Few meetings in every other job, as with quick batches; in the others one after every round.
        dealing.MEETING_SECONDS = float(given.get("meeting", number % 2))
        code = torch.tensor([run(given)])
        codes = [torch.zeros_like(code) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(codes, code)
        told.append([int(one) for one in codes])
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(told), encoding="utf-8")
    torch.distributed.destroy_process_group()
