"""Commands under torchrun: any number of them in processes that join only once, with faults put in.

A job is `{"command": "evaluate", "argv": [...]}`; `further` arguments go to all but the first process. Its `fault`, one
of FAULTS, happens in `process` (1) at the n-th call (`at`, 2) of the function that `hook` names, one of HOOKS. Run as
`-m tests.runs.jobs JOBS.json OUT.json`, OUT.json holds, by job, the exit code of every process. Without OUT.json the
first job alone runs, and the process ends as the command does.
"""

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from fillm.errors import NumericsError, RunFolderError

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SAMPLES = 3  # of a store: several blocks of a few samples
HOOKS = {
    "batch of answers": "fillm.evaluate.halving.Halving.run",
    "generation of a batch": "fillm.evaluate.generate._continued",
    "gradient of a batch": "fillm.evaluate.gradient_norm.SquaredNorms.observe",
    "gradient of a step": "fillm.unlearn.gradients.StepGradients._accumulate",
    "forming of a step": "fillm.unlearn.gradients.StepGradients.form",
    "curvature of a step": "fillm.unlearn.sophia.sampled_gradients",
    "recording a batch": "fillm.unlearn.reference.record",
    "telling of a batch": "fillm.rank.console.Bar.advance",
    "keeping a pass": "fillm.runs.RunFolder.save_stage",
    "gradients of a batch": "fillm.rank.passes.Passes._batch",
    "handing over gradients": "fillm.rank.dealt_grams.pack",
    "storing a block": "fillm.statistics.StoredSketches._store_block",
    "saving a state": "fillm.runs.RunFolder.save_state",
    "finishing": "fillm.runs.RunFolder.finish",
}


def torchrun(processes: int, *words: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """A module and its arguments on some processes, with one thread each."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         f"--max-restarts={restarts}", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip


def run_jobs(
    processes: int, jobs: Sequence[Mapping[str, Any]], folder: Path, module: str = "tests.runs.jobs"
) -> tuple[list[list[int]], str]:
    """The exit codes of every job's processes, and stderr of all; `module` is one that calls `serve`."""
    given, told = folder / f"jobs{processes}.json", folder / f"told{processes}.json"
    given.write_text(json.dumps(jobs), encoding="utf-8")
    done = torchrun(processes, "-m", module, str(given), str(told))
    assert done.returncode == 0, done.stderr
    return json.loads(told.read_text(encoding="utf-8")), done.stderr


def lines_of(said: str, command: str) -> list[str]:
    """What a command said in a line of its own for an error."""
    head = f"fillm {command}: "
    return [line.removeprefix(head) for line in said.splitlines() if line.startswith(head)]


def is_here(job: Mapping[str, Any]) -> bool:
    """Whether this process is the one that the job's fault happens in, and torchrun has not started it again."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return "fault" in job and job.get("process", 1) == int(os.environ["RANK"]) and not again


def code_of(main: Callable[[list[str]], int], job: Mapping[str, Any]) -> int:
    """The exit code of a job's command in this process; of a fault of ours, that of the interpreter."""
    try:
        return main([*job["argv"], *(job.get("further", []) if int(os.environ["RANK"]) else [])])
    except ZeroDivisionError as error:
        print(f"Fault of ours: {error}", file=sys.stderr)
        return 1


def run(job: Mapping[str, Any]) -> int:
    """The exit code of one job in this process."""
    main = importlib.import_module(f"fillm.{job['command']}.__main__").main
    calls, hook = 0, HOOKS[job.get("hook", "finishing")]
    real = pkgutil.resolve_name(hook)

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == job.get("at", 2):
            FAULTS[job["fault"]](given)
        return real(*given, **options)

    with mock.patch(hook, counted if is_here(job) else real):
        return code_of(main, job)


def _raise(error: Exception) -> None:
    raise error


def _drift(given: tuple[Any, ...]) -> None:
    """A weight of this process alone changes, as by a fault of its memory."""
    next(iter(given[0].parameters.values())).data.view(-1)[0] += 0.5


FAULTS: dict[str, Callable[[tuple[Any, ...]], None]] = {
    "error": lambda given: _raise(NumericsError("a number is nan")),
    "disk": lambda given: _raise(RunFolderError("no space left on the disk")),
    "bug": lambda given: _raise(ZeroDivisionError("a fault of ours")),
    "drift": _drift,
    "stop": lambda given: os.kill(os.getpid(), signal.SIGTERM),
    "kill": lambda given: os.kill(os.getpid(), signal.SIGKILL),
}


def serve(run: Callable[[Mapping[str, Any]], int], given: str, told: str | None = None) -> None:
    """Runs jobs in processes that join once, as the first lines of this file say.

    Args:
        run: the exit code of one job in this process.
        given: the file of the jobs.
        told: the file that their exit codes go to; without one the first job alone runs.
    """
    import torch

    from fillm.config import leave
    from fillm.rank import dealing, ranking_files
    from fillm.runs import processes
    from fillm.statistics import store_writer

    ranking_files.score_heatmap = lambda *given, **options: None
    store_writer.BLOCK_SAMPLES = BLOCK_SAMPLES
    torch.set_num_threads(1)
    processes._BLOCK = 1000  # several to a tensor, and one that is not full
    dealing.MEETING_SECONDS = 0.0
    jobs, codes = json.loads(Path(given).read_text(encoding="utf-8")), []
    if told is None:
        leave(run(jobs[0]))
    processes.Processes._disband = lambda self, done: None
    for number, job in enumerate(jobs):
        # Few meetings in every other job, as with quick batches; in the others one after every round.
        dealing.MEETING_SECONDS = float(job.get("meeting", number % 2))
        code = torch.tensor([run(job)])
        every = [torch.zeros_like(code) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(every, code)
        codes.append([int(one) for one in every])
    if os.environ["RANK"] == "0":
        Path(told).write_text(json.dumps(codes), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    serve(run, *sys.argv[1:])
