"""Any number of processes under torchrun gives the ranking of one, and ends as one; gloo on the CPU."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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

PATH = ["--method", "path", "--path-rise", "0.1", "--path-points", "2", "--granularity", "element"]
PATH += ["--path-rounds", "3", "--path-keep", "0.2"]
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
    "path": ["--method", "path", "--path-rise", "0.1", "--path-points", "2"],
    "path by rows": ["--method", "path", "--path-rise", "0.1", "--path-points", "2", "--granularity", "row"],
    "path by weights": [*PATH, "--tokens-per-batch", "1"],
    "experts": [],
    "woodbury": ["--curvature", "woodbury"],
    "woodbury, groups": ["--curvature", "woodbury", "--memory", "384KiB"],
    "woodbury u": ["--curvature", "woodbury", "--save-update", "--tokens-per-batch", "1"],
    "per sample": ["--method", "soir-per-sample"],
    "first-order": ["--method", "first-order"],
    "experts, first-order": ["--method", "first-order", "--tokens-per-batch", "24"],
}
SAME_BYTES = ("woodbury", "woodbury, groups", "per sample", "first-order")  # as one process
# Of the largest number, by how a name begins. Rows of `u` are of any size, and `v - w` cancels in some.
CANCELLING = {"traded off": 1e-5, "damage by": 1e-6, "path": 1e-6, "rows": 1e-8, "heads": 1e-8}

run_jobs = partial(running.run_jobs, module="tests.rank.several_processes")


@pytest.fixture(scope="module")
def command(
    model_folder: str, forget_file: str, retain_file: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    experts = tmp_path_factory.mktemp("model") / "mixtral"
    build_family("mixtral").save_pretrained(experts)
    word_tokenizer().save_pretrained(experts)

    def build(out: Path, *further: str) -> list[str]:
        model = str(experts) if out.name.startswith("experts") else model_folder
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
    """A trade-off is a gain less a loss, a row's damage a sum that cancels: float32 knows them no better than this.

    So are the contributions along a path, which have both signs.
    """
    part = next((part for head, part in CANCELLING.items() if name.startswith(head)), 0.0)
    return part * float(np.abs(column[np.isfinite(column)]).max(initial=0.0))


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
        unmoved = update.isinf()  # by the step of a path: minus infinity in both
        assert torch.equal(ours.updates[name].isinf(), unmoved), (found, name)
        ours_, theirs_ = (one.double().masked_fill(unmoved, 0.0) for one in (ours.updates[name], update))
        assert float((ours_ - theirs_).norm()) <= 1e-6 * float(theirs_.norm()), (found, name)
    assert ours.samples.equals(theirs.samples)
    assert ours.per_sample == theirs.per_sample  # None, or from inner products with the same bits


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_ranking_is_that_of_one_process(processes, command, alone, tmp_path) -> None:
    jobs = [{"argv": command(tmp_path / name, *further)} for name, further in METHODS.items()]
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for name in METHODS:
        assert_same(tmp_path / name, alone / name)
    for name in SAME_BYTES:
        both = [(folder / name / "ranking.parquet").read_bytes() for folder in (tmp_path, alone)]
        assert both[0] == both[1], name
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
        {"argv": command(tmp_path / "other", "--num-retain", "9"), "further": ["--seed", "1"]},
        {"argv": command(tmp_path / "stop", *always), "fault": "stop", "meeting": 0, "process": 1},
        {"argv": command(tmp_path / "stop", *always, "--resume")},
        {"argv": command(tmp_path / "forget", *always), "fault": "stop", "pass": "forget pass", "batch": 1},
        {"argv": command(tmp_path / "forget", *always, "--resume")},
    ]
    codes, said = run_jobs(3, jobs, tmp_path)
    assert codes == [[code] * 3 for code in (2, 0, 1, 2, 2, 2, 3, 0, 3, 0)], said
    for line in (
        "fillm rank: a number is nan",
        "Fault of ours: a fault of ours",
        "fillm rank: no space left on the disk",
        "fillm rank: the processes do not compute the same: give all of them the same files, fillm and hardware",
        "fillm rank: stopped by a signal to another process in the retain pass; continue with --resume",
    ):
        assert said.splitlines().count(line) == 1, (line, said)
    assert len([line for line in said.splitlines() if line.startswith("fillm rank: ")]) == 6, said
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
def test_a_path_ends_in_all_and_resumes_where_it_was(command, alone, tmp_path) -> None:
    always = [*METHODS["path by weights"], "--checkpoint-seconds", "1e-9"]
    later = "round 2 of 3, retain pass at point 2 of 2"
    jobs: list[dict[str, Any]] = [
        {"argv": command(tmp_path / "path by weights", *always), "fault": "stop", "pass": later},
        {"argv": command(tmp_path / "path by weights", *always, "--resume")},
        {"argv": command(tmp_path / "high", "--method", "path", "--include", "*model.norm*", "--path-rise", "1e6")},
        {"argv": command(tmp_path / "overflow" / "path by weights", *always), "overflow": 6.3},
    ]
    codes, said = run_jobs(2, jobs, tmp_path)
    assert codes == [[3, 3], [0, 0], [2, 2], [0, 0]], said
    assert said.count("fillm rank: --path-rise 1e+06: along the sign of its gradient the forget loss rises") == 1, said
    assert said.count(f"fillm rank: stopped by a signal to another process in the {later}; continue") == 1, said
    wanted = Ranking.load(alone / "path by weights")
    for folder in (tmp_path, tmp_path / "overflow"):
        assert_same(folder / "path by weights", alone / "path by weights")
        found = Ranking.load(folder / "path by weights")
        assert found.record["path"]["length"] == wanted.record["path"]["length"]
        for fraction in (0.2, 0.5):
            assert (found.select(fraction) & wanted.select(fraction)).count == wanted.select(fraction).count


@pytest.mark.slow
def test_a_path_that_was_killed_is_resumed_by_any_number(command, alone, as_they_have, tmp_path) -> None:
    jobs, argv = tmp_path / "jobs.json", command(tmp_path / "path by weights", *METHODS["path by weights"])
    argv += ["--checkpoint-seconds", "1e-9"]
    job = {"argv": argv, "fault": "kill", "batch": 3, "pass": "round 3 of 3, forget pass at point 2 of 2"}
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    assert torchrun(2, "-m", "tests.rank.several_processes", str(jobs)).returncode != 0
    other = tmp_path / "three" / "path by weights"
    shutil.copytree(tmp_path / "path by weights.partial", other.with_suffix(".partial"))
    assert main([*argv, "--resume"]) == 0
    argv[argv.index("--out") + 1] = str(other)
    codes, said = run_jobs(3, [{"argv": [*argv, "--resume"]}], tmp_path)
    assert codes == [[0, 0, 0]], said
    for folder in (tmp_path, other.parent):
        assert_same(folder / "path by weights", alone / "path by weights")


@pytest.mark.slow
def test_gram_matrices_that_are_done_are_resumed_by_any_number(command, alone, as_they_have, tmp_path) -> None:
    name = "woodbury, groups"
    argv = command(tmp_path / name, *METHODS[name], "--checkpoint-seconds", "1e-9")
    later = {"pass": "retain pass, group 2 of 3", "batch": 1}
    spoilt = command(tmp_path / "spoilt", *METHODS[name])
    jobs = [
        {"argv": argv, "fault": "stop", **later},
        {"argv": spoilt, "fault": "error", **later},
        {"argv": spoilt, "fault": "bug", **later, "pass": "forget pass, group 2 of 3", "when": "within"},
    ]
    codes, said = run_jobs(2, jobs, tmp_path)
    assert codes == [[3, 3], [2, 2], [1, 1]], said
    assert said.count(f"fillm rank: stopped by a signal to another process in the {later['pass']}; continue") == 1, said
    assert said.splitlines().count("fillm rank: a number is nan") == 1, said
    left = tmp_path / f"{name}.partial"
    assert list(left.glob("*grams-1*"))
    other = tmp_path / "three" / name
    shutil.copytree(left, other.with_name(left.name))
    assert main([*argv, "--resume"]) == 0
    argv[argv.index("--out") + 1] = str(other)
    codes, said = run_jobs(3, [{"argv": [*argv, "--resume"]}], tmp_path)
    assert codes == [[0, 0, 0]] and "group 1 of 3" not in said, said
    for folder in (tmp_path / name, other):
        assert_same(folder, alone / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [("error", "a number is nan"), ("kill", "another process of the run has died; continue with --resume")],
)
def test_an_end_while_gradients_are_handed_over_is_told_once(fault, line, command, tmp_path) -> None:
    job = {"command": "rank", "argv": command(tmp_path / "run", "--method", "first-order"), "fault": fault, "at": 5}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([job | {"hook": "handing over gradients"}]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs))
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    told = [said for said in done.stderr.splitlines() if said.startswith("fillm rank: ")]
    assert told == [f"fillm rank: {line}"], done.stderr


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
