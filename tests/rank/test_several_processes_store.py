"""Any number of processes under torchrun sketches as one does: rankings, and the bytes of a store; gloo on the CPU."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from fillm.rank import ranking_files
from fillm.rank.__main__ import main
from fillm.statistics import SketchStore, store_writer
from tests.rank.conftest import question_row, write_rows
from tests.rank.test_several_processes import assert_same
from tests.runs.jobs import BLOCK_SAMPLES, lines_of, run_jobs, torchrun

SKETCHED = ("--compression", "sjlt", "--sketch-dim", "64")
METHODS: dict[str, Sequence[str]] = {
    "soir": SKETCHED,
    "again": SKETCHED,
    "damage": (*SKETCHED, "--objective", "retain"),
    "one sample a batch": (*SKETCHED, "--tokens-per-batch", "1"),
    "inverse": (*SKETCHED, "--curvature", "woodbury"),
    "per sample": (*SKETCHED, "--method", "soir-per-sample"),
    "first order": (*SKETCHED, "--method", "first-order"),
    "memflex": (*SKETCHED, "--method", "memflex"),
    "published": ("--compression", "oporp", "--sketch-dim", "64", "--damping-dimension", "sketch"),
    "factored": ("--compression", "factored-sjlt", "--sketch-dim", "64", "--sketch-dtype", "bfloat16"),
    "chosen": ("--compression", "auto", "--memory", "4MiB"),
}
# One after another: a store built, another forget set and another method ranked from it, the store made longer.
STORED: dict[str, Sequence[str]] = {
    "built": SKETCHED,
    "other": ("--method", "first-order"),
    "longer": (),
}


@pytest.fixture(scope="module")
def as_they_have(one_thread: None) -> Iterator[None]:
    """What the processes under torchrun have: one thread, small blocks of a store, no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "BLOCK_SAMPLES", BLOCK_SAMPLES)
        patch.setattr(ranking_files, "score_heatmap", lambda *given, **options: None)
        yield


@pytest.fixture(scope="module")
def argv(
    model_folder: str, forget_file: str, retain_file: str, as_they_have: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """The arguments of a run into a folder; what it does is said by the folder's name."""
    more = write_rows(tmp_path_factory.mktemp("rows") / "more", [question_row(n, 2 + n % 5) for n in range(20, 39)])
    Path(more).rename(longer := more + ".jsonl")
    sets = {"other": (f"{retain_file}[:5]", None), "longer": (forget_file, longer)}

    def build(out: Path, *further: str) -> list[str]:
        forget, retain = sets.get(out.name, (forget_file, retain_file))
        given = ["--model", model_folder, "--forget", forget, *(["--retain", retain] if retain else [])]
        settings = [*METHODS.get(out.name, ()), *STORED.get(out.name, ())]
        stored = ["--store", str(out.parent / "store")] if out.name in STORED else []
        return [*given, "--device", "cpu", "--tokens-per-batch", "48", "--out", str(out), *settings, *stored, *further]

    return build


@pytest.fixture(scope="module")
def alone(argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of one process, and its store."""
    folder = tmp_path_factory.mktemp("alone")
    for name in (*METHODS, *STORED):
        assert main(argv(folder / name)) == 0, name
    assert len(SketchStore.open(folder / "store").manifest.blocks) > 3
    return folder


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_rankings_and_stores_are_those_of_one_process(processes, argv, alone, tmp_path) -> None:
    jobs = [{"command": "rank", "argv": argv(tmp_path / name)} for name in (*METHODS, *STORED)]
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for name in (*METHODS, *STORED):
        assert_same(tmp_path / name, alone / name)
    ours, theirs = (pyarrow.parquet.read_table(f / "per sample" / "per_sample.parquet") for f in (tmp_path, alone))
    assert ours["name"].to_pylist() == theirs["name"].to_pylist()
    np.testing.assert_allclose(ours["score"].to_numpy(), theirs["score"].to_numpy(), rtol=1e-6)
    assert files(tmp_path / "store") == files(alone / "store")
    for name in ("ranking.parquet", "samples.parquet"):
        assert (tmp_path / "soir" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_what_ends_one_process_ends_all_and_the_store_goes_on(argv, alone, tmp_path) -> None:
    def job(name: str, *flags: str, **faults: Any) -> dict[str, Any]:
        return {"command": "rank", "argv": argv(tmp_path / name / "built", "--tokens-per-batch", "1", *flags), **faults}

    batches = {"hook": "gradients of a batch"}
    jobs = [
        job("error", **batches, fault="error", process=2, at=6),
        job("error"),
        job("bug", **batches, fault="bug", process=0, at=6),
        job("bug"),
        job("stop", **batches, fault="stop", at=6),
        job("stop"),
        job("disk", hook="storing a block", fault="disk", process=0, at=2),
        job("disk"),
        job("disk", "--overwrite", "--seed", "2"),
    ]
    codes, said = run_jobs(3, jobs, tmp_path)
    assert codes == [[code] * 3 for code in (2, 0, 1, 0, 3, 0, 2, 0, 2)], said
    told = lines_of(said, "rank")
    assert told[:3] == [
        "a number is nan",
        "stopped by a signal to another process in the retain pass; continue with --resume",
        "no space left on the disk",
    ], said
    assert len(told) == 4 and "seed was 0, is 2" in told[3]
    assert main(argv(tmp_path / "whole" / "built", "--tokens-per-batch", "1")) == 0
    for name in ("error", "bug", "stop", "disk"):
        assert_same(tmp_path / name / "built", tmp_path / "whole" / "built")
        assert files(tmp_path / name / "store") == files(tmp_path / "whole" / "store")


@pytest.mark.slow
def test_a_killed_process_leaves_a_store_that_any_number_continues(argv, alone, as_they_have, tmp_path) -> None:
    jobs, single = tmp_path / "jobs.json", ("--tokens-per-batch", "1")
    job = {"command": "rank", "argv": argv(tmp_path / "run" / "built", *single), "hook": "gradients of a batch"}
    jobs.write_text(json.dumps([{**job, "fault": "kill", "at": 7}]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs))
    assert done.returncode != 0
    assert lines_of(done.stderr, "rank") == ["another process of the run has died; continue with --resume"]
    left = SketchStore.open(tmp_path / "run" / "store")
    assert 0 < left.rows < 14 and not left.complete
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert main(argv(tmp_path / "run" / "built", *single)) == 0
    codes, said = run_jobs(3, [{"command": "rank", "argv": argv(tmp_path / "again" / "built", *single)}], tmp_path)
    assert codes == [[0, 0, 0]], said
    assert files(tmp_path / "run" / "store") == files(tmp_path / "again" / "store")
    assert_same(tmp_path / "again" / "built", tmp_path / "run" / "built")
