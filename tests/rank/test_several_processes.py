"""Any number of processes under torchrun gives the ranking of one, and ends as one; gloo on the CPU."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fillm.rank import ranking_files
from fillm.rank.__main__ import main
from fillm.rank.dealing import rounds
from fillm.rank.ranking import Ranking
from fillm.statistics import retain
from tests.families import build_family
from tests.rank.conftest import word_tokenizer
from tests.rank.several_processes import SMALL_TENSOR
from tests.runs import jobs as running
from tests.runs.jobs import torchrun

METHODS: dict[str, list[str]] = {
    "certified": [],
    "certified again": [],
    "all of them exact": ["--tolerance", "1e-9"],
    "u": ["--save-update"],
    "damage": ["--objective", "retain"],
    "damage by rows": ["--granularity", "row", "--objective", "retain"],
    "traded off": ["--objective", "trade-off"],
    "one batch": ["--tokens-per-batch", "100000"],
    "one sample a batch": ["--tokens-per-batch", "1", "--save-update"],
    "packed": ["--layout", "packed"],
    "diagonal": ["--curvature", "diagonal"],
    "groups": ["--groups", "3", "--save-update"],
    "soir-sum in groups": ["--groups", "2", "--method", "soir-sum"],
    "bfloat16": ["--dtype", "bfloat16", "--save-update"],
    "soir-sum": ["--method", "soir-sum"],
    "gradient": ["--method", "gradient", "--granularity", "element"],
    "fisher-ratio": ["--method", "fisher-ratio"],
    "memflex": ["--method", "memflex"],
    "wagle": ["--method", "wagle"],
    "saliency": ["--method", "saliency"],
    "random": ["--method", "random"],
    "experts": [],
}


run_jobs = partial(running.run_jobs, module="tests.rank.several_processes")


@pytest.fixture(scope="module")
def command(
    model_folder: str, forget_file: str, retain_file: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    experts = tmp_path_factory.mktemp("model") / "mixtral"
    build_family("mixtral").save_pretrained(experts)
    word_tokenizer().save_pretrained(experts)

    def build(out: Path, *further: str) -> list[str]:
        model = str(experts) if out.name == "experts" else model_folder
        given = ["--model", model, "--forget", forget_file, "--retain", retain_file, "--device", "cpu"]
        return [*given, "--tokens-per-batch", "48", "--out", str(out), *further]

    return build


@pytest.fixture(scope="module")
def as_they_have(one_thread: None) -> Iterator[None]:
    """What the processes under torchrun have: one thread, small tensors taken for large ones, no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retain, "EXPANSION_NUMEL", SMALL_TENSOR)
        patch.setattr(ranking_files, "score_heatmap", lambda *given, **options: None)
        yield


@pytest.fixture(scope="module")
def alone(command: Callable[..., list[str]], as_they_have: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, further in METHODS.items():
        assert main(command(folder / name, *further)) == 0, name
    return folder


def rounding(name: str, column: np.ndarray) -> float:
    """A trade-off is a gain less a loss, a row's damage a sum that cancels: float32 knows them no better than this."""
    return {"traded off": 1e-5, "damage by rows": 1e-6}.get(name, 0.0) * float(
        np.abs(column[np.isfinite(column)]).max()
    )


def assert_same(found: Path, wanted: Path) -> None:
    """Two run folders say the same within 1e-6, of every number relative to its size."""
    ours, theirs = (Ranking.load(path) for path in (found, wanted))
    assert ours.names == theirs.names
    for column in theirs.table.column_names:
        a, b = (ranking.table[column].to_pylist() for ranking in (ours, theirs))
        if isinstance(b[0], float):
            a, b = np.array(a, float), np.array(b, float)
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=rounding(found.name, b), err_msg=f"{found.name} {column}")
        else:
            assert a == b, (found, column)
    for name, update in (theirs.updates or {}).items():
        difference = (ours.updates[name].double() - update.double()).norm()
        assert float(difference) <= 1e-6 * float(update.double().norm()), (found, name)
    assert ours.samples.equals(theirs.samples)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_ranking_is_that_of_one_process(processes, command, alone, tmp_path) -> None:
    jobs = [{"argv": command(tmp_path / name, *further)} for name, further in METHODS.items()]
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for name in METHODS:
        assert_same(tmp_path / name, alone / name)
    for name in ("ranking.parquet", "samples.parquet"):
        twice = [(tmp_path / which / name).read_bytes() for which in ("certified", "certified again")]
        assert twice[0] == twice[1]


@pytest.mark.slow
def test_what_ends_one_process_ends_all_and_is_told_once(command, alone, tmp_path) -> None:
    always = [*METHODS["one sample a batch"], "--checkpoint-seconds", "1e-9"]
    jobs: list[dict[str, Any]] = [
        {"argv": command(tmp_path / "error", *always), "fault": "error", "meeting": 0},
        {"argv": command(tmp_path / "error", *always, "--resume")},
        {"argv": command(tmp_path / "bug"), "fault": "bug", "batch": 1, "process": 2},
        {"argv": command(tmp_path / "disk", *always), "fault": "disk", "process": 0, "meeting": 0},
        {"argv": command(tmp_path / "scope", "--include", "nothing")},
        {"argv": command(tmp_path / "pairs", "--curvature", "woodbury")},
        {"argv": command(tmp_path / "path", "--method", "path")},
        {"argv": command(tmp_path / "other", "--num-retain", "9"), "further": ["--seed", "1"]},
        {"argv": command(tmp_path / "stop", *always), "fault": "stop", "meeting": 0, "process": 1},
        {"argv": command(tmp_path / "stop", *always, "--resume")},
        {"argv": command(tmp_path / "forget", *always), "fault": "stop", "pass": "forget pass", "batch": 1},
        {"argv": command(tmp_path / "forget", *always, "--resume")},
    ]
    codes, said = run_jobs(3, jobs, tmp_path)
    assert codes == [[code] * 3 for code in (2, 0, 1, 2, 2, 2, 2, 2, 3, 0, 3, 0)], said
    for line in (
        "fillm rank: a number is nan",
        "Fault of ours: a fault of ours",
        "fillm rank: no space left on the disk",
        "fillm rank: --curvature woodbury takes one process: exact inner products of samples are not dealt out; leave "
        "out torchrun, or give --compression",
        "fillm rank: --method path takes one process: the search of its step is not dealt out; leave out torchrun",
        "fillm rank: the processes do not compute the same: give all of them the same files, fillm and hardware",
        "fillm rank: stopped by a signal to another process in the retain pass; continue with --resume",
    ):
        assert said.splitlines().count(line) == 1, (line, said)
    assert len([line for line in said.splitlines() if line.startswith("fillm rank: ")]) == 8, said
    assert not (tmp_path / "disk").exists() and not (tmp_path / "bug").exists()
    for name in ("error", "stop", "forget"):
        assert_same(tmp_path / name, alone / "one sample a batch")


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_that_any_number_resumes(command, alone, as_they_have, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    argv = command(tmp_path / "run", *METHODS["one sample a batch"], "--checkpoint-seconds", "1e-9")
    job = {"argv": argv, "fault": "kill", "meeting": 0, "batch": 3}
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.rank.several_processes", str(jobs))
    assert done.returncode != 0
    assert done.stderr.count("fillm rank: another process of the run has died; continue with --resume") == 1
    left = tmp_path / "run.partial"
    assert left.is_dir() and not (tmp_path / "run").exists()
    assert (left / "state.json").is_file()
    shutil.copytree(left, tmp_path / "again.partial")
    assert main([*argv, "--resume"]) == 0
    assert_same(tmp_path / "run", alone / "one sample a batch")
    argv[argv.index("--out") + 1] = str(tmp_path / "again")
    codes, said = run_jobs(3, [{"argv": [*argv, "--resume"]}], tmp_path)
    assert codes == [[0, 0, 0]], said
    assert_same(tmp_path / "again", alone / "one sample a batch")


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_resume(command, alone, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    argv = command(tmp_path / "run", *METHODS["one sample a batch"], "--checkpoint-seconds", "1e-9", "--resume")
    jobs.write_text(json.dumps([{"argv": argv, "fault": "kill", "batch": 4}]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.rank.several_processes", str(jobs), restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing to resume; starting anew") == 1  # the first time
    assert_same(tmp_path / "run", alone / "one sample a batch")


@pytest.mark.slow
def test_the_command_itself_speaks_once(command, alone, tmp_path) -> None:
    done = torchrun(2, "-m", "fillm.rank", *command(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1 and done.stderr.count("retain pass: 14 samples in") == 1
    refused = torchrun(2, "-m", "fillm.rank", *command(tmp_path / "run"))
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if line.startswith("fillm rank: ")]
    assert len(lines) == 1 and "exists; give --overwrite" in lines[0]


@pytest.mark.parametrize(
    ("start", "count", "processes", "led", "wanted"),
    [
        (0, 5, 2, False, [[0, 1], [2, 3], [4]]),
        (0, 5, 2, True, [[0], [1, 2], [3, 4]]),
        (1, 5, 3, True, [[1, 2, 3], [4]]),
        (0, 1, 3, True, [[0]]),
        (5, 5, 2, False, []),
        (0, 3, 1, False, [[0], [1], [2]]),
    ],
)
def test_rounds(start, count, processes, led, wanted) -> None:
    assert [list(members) for members in rounds(start, count, processes, led)] == wanted
