"""Any number of processes under torchrun scores a model as one does, and ends as one; gloo on the CPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from fillm.evaluate.__main__ import main
from tests.evaluate.conftest import arguments
from tests.evaluate.stand_in_harness import write_harness
from tests.rank.conftest import question_row, write_rows
from tests.runs.jobs import lines_of, run_jobs, torchrun


@pytest.fixture(scope="module")
def argv(
    model_folder: str, retain_folder: str, data_root: str, one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """The arguments of a run into a folder; what it does is said by the folder's name."""
    work = tmp_path_factory.mktemp("rows")
    (work / "knowundo" / "privacy").mkdir(parents=True)
    for name, first in (("unlearn_val", 0), ("retention_val", 40)):
        write_rows(
            work / "knowundo" / "privacy" / f"{name}.jsonl", [question_row(first + n, 2 + n % 4) for n in range(7)]
        )
    holdout = write_rows(work / "holdout.jsonl", [question_row(number) for number in range(60, 65)])
    reference, given = str(work / "reference"), {"model": model_folder, "device": "cpu", "max_new_tokens": 70}
    tofu = {**given, "data_root": data_root, "forget": "forget01", "tokens_per_batch": 30, "batch_size": 3}
    assert main(arguments({**tofu, "model": retain_folder, "out": reference})) == 0
    kinds: dict[str, dict[str, Any]] = {
        "tofu": {**tofu, "reference": reference},
        "again": {**tofu, "reference": reference},
        "one batch": {**tofu, "tokens_per_batch": None, "batch_size": None, "num_forget": 2},
        "one row a batch": {**tofu, "batch_size": 1},
        "fictional": {
            **given, "benchmark": "fictional-small", "forget": "forget05", "num_forget": 5, "num_retain": 4,
            "metrics": "probability,truth-ratio,memorisation,mia-min-k-plus-plus",
        },
        "knowundo": {
            **given, "benchmark": "knowundo", "forget": "privacy", "data_root": str(work), "holdout": holdout,
            "metrics": "probability,rouge,accuracy,perplexity,mia-gradient-norm", "batch_size": 2,
        },
    }  # fmt: skip

    def build(out: Path, **changes: Any) -> list[str]:
        return arguments({**kinds.get(out.name, kinds["tofu"]), **changes, "out": str(out)})

    build.kinds = list(kinds)
    return build


@pytest.fixture(scope="module")
def alone(argv: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in argv.kinds:
        assert main(argv(folder / kind)) == 0, kind
    return folder


def assert_same(found: Path, wanted: Path) -> None:
    """Two folders say the same: every figure within 1e-6, generated texts and notes to the letter."""
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (found, wanted))
    assert ours.pop("notes") == theirs.pop("notes") and list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name] == (None if value is None else pytest.approx(value, rel=1e-6)), (found.name, name)
    rows = [pyarrow.parquet.read_table(path / "rows.parquet") for path in (found, wanted)]
    assert rows[0].schema == rows[1].schema
    for name in rows[1].column_names:
        for a, b in zip(*(table[name].to_pylist() for table in rows), strict=True):
            if isinstance(b, float | list):
                np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=f"{found.name} {name}")
            else:
                assert a == b, (found.name, name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_figures_and_answers_are_those_of_one_process(processes, argv, alone, tmp_path) -> None:
    jobs = [{"command": "evaluate", "argv": argv(tmp_path / kind)} for kind in argv.kinds]
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for kind in argv.kinds:
        assert_same(tmp_path / kind, alone / kind)
        assert yaml.safe_load((tmp_path / kind / "run.yaml").read_text())["processes"] == processes
    for name in ("summary.json", "rows.parquet"):
        assert (tmp_path / "tofu" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert said.count("answers: ") == 2 * len(argv.kinds)  # before and after the pass, of one process


@pytest.mark.slow
def test_what_ends_one_process_ends_all_and_is_told_once(argv, alone, tmp_path) -> None:
    def job(name: str, **changes: Any) -> dict[str, Any]:
        faults = {
            key: changes.pop(key) for key in ("fault", "hook", "at", "process", "meeting", "further") if key in changes
        }
        flags = changes.pop("flags", ())
        return {"command": "evaluate", "argv": [*argv(tmp_path / name, **changes), *flags], **faults}

    jobs = [
        job("error", fault="error", hook="batch of answers", meeting=0),
        job("bug", fault="bug", hook="batch of answers", at=1, process=2),
        job("stop", fault="stop", hook="batch of answers", at=5, meeting=0),
        job("stop", flags=["--resume"]),
        job("disk", fault="disk", hook="keeping a pass", process=0),
        job("disk", flags=["--resume"]),
        job("full", fault="disk", hook="finishing", at=1, process=0),
        job("nan", fault="error", hook="gradient of a batch", at=1, process=2),
        job("split", forget="forget77"),
        job("harness", lm_eval="arc_easy"),
        job("other", reference=None, further=["--num-forget", "3"]),
        job("stop"),
        job("dry", flags=["--dry-run"]),
    ]
    codes, said = run_jobs(3, jobs, tmp_path)
    assert codes == [[code] * 3 for code in (2, 1, 3, 0, 2, 0, 2, 0, 2, 2, 2, 2, 0)], said
    refused = f"{tmp_path / 'stop'} exists; give --overwrite or another --out"
    assert lines_of(said, "evaluate") == [
        "a number is nan",
        "stopped by a signal to another process in answers; continue with --resume",
        "no space left on the disk",
        "no space left on the disk",
        "--forget forget77: no forget split of tofu; there are forget01, forget05, forget10 (rows of your own go into "
        "a folder given as --data-root)",
        "--lm-eval arc_easy: the package lm-eval is not installed; pip install lm-eval, or leave out --lm-eval",
        "the processes do not compute the same: give all of them the same files, fillm and hardware",
        refused,
    ], said
    assert said.count("Fault of ours: a fault of ours") == 1
    assert not any((tmp_path / name).exists() for name in ("error", "bug", "full", "split", "harness", "other", "dry"))
    for name in ("stop", "disk"):
        assert_same(tmp_path / name, alone / "tofu")
    # Where one gradient cannot be had, the reason stands in the place of one figure, whichever process found it.
    summary = json.loads((tmp_path / "nan" / "summary.json").read_text())
    assert summary["mia_gradient_norm_auc"] is None and summary["notes"]["mia_gradient_norm_auc"] == "a number is nan"
    assert summary["model_utility"] == json.loads((alone / "tofu" / "summary.json").read_text())["model_utility"]


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_that_any_number_resumes(argv, alone, one_thread, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    job = {"command": "evaluate", "argv": argv(tmp_path / "run"), "hook": "generation of a batch", "fault": "kill"}
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs))
    assert done.returncode != 0
    assert lines_of(done.stderr, "evaluate") == ["another process of the run has died; continue with --resume"]
    left = tmp_path / "run.partial"
    assert (left / "stage-answers.json").is_file() and not (tmp_path / "run").exists()
    shutil.copytree(left, tmp_path / "again.partial")
    assert main([*argv(tmp_path / "run"), "--resume"]) == 0
    codes, said = run_jobs(3, [{"command": "evaluate", "argv": [*argv(tmp_path / "again"), "--resume"]}], tmp_path)
    assert codes == [[0, 0, 0]], said
    for name in ("run", "again"):
        assert_same(tmp_path / name, alone / "tofu")


@pytest.mark.slow
def test_the_command_itself_speaks_once(argv, alone, tmp_path) -> None:
    done = torchrun(2, "-m", "fillm.evaluate", *argv(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    assert_same(tmp_path / "run", alone / "tofu")


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_resume(argv, alone, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    job = {"command": "evaluate", "argv": [*argv(tmp_path / "run"), "--resume"], "hook": "generation of a batch"}
    jobs.write_text(json.dumps([{**job, "fault": "kill"}]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs), restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing to resume; starting anew") == 1  # the first time
    assert done.stderr.count("answers: ") == 2  # which had finished this pass
    assert_same(tmp_path / "run", alone / "tofu")


@pytest.mark.slow
def test_requests_of_the_harness_are_dealt_out(argv, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_harness(tmp_path)))
    asked = {"lm_eval": "counting", "metrics": "probability", "reference": None, "batch_size": 2}
    summaries = []
    for processes in (1, 2, 3):
        out = tmp_path / f"run{processes}"
        done = torchrun(processes, "-m", "fillm.evaluate", *argv(out, **asked))
        assert done.returncode == 0, done.stderr
        summaries.append(json.loads((out / "summary.json").read_text()))
    whole, *dealt = ({name: v for name, v in one.items() if name.startswith("lm_eval/")} for one in summaries)
    assert whole.pop("lm_eval/counting/generate_until_calls") == 3 * 23
    drawn = [f"lm_eval/counting/drawn_{number}_calls" for number in range(3)]
    assert [whole[name] for name in drawn] == [23, 46, 69]
    for some, greedy in ((dealt[0], 12), (dealt[1], 8)):  # what is drawn is not dealt out
        assert [some[name] for name in drawn] == [23, 46, 46 + greedy]
    for calls, some in ((36, dealt[0]), (24, dealt[1])):  # blocks of 12 and of 8 of 23 requests
        assert some.pop("lm_eval/counting/generate_until_calls") == calls
        for name, value in whole.items():
            assert name.endswith("_calls") or some[name] == pytest.approx(value, rel=1e-12), name

    monkeypatch.setenv("HARNESS_BREAKS", "yes")
    done = torchrun(2, "-m", "fillm.evaluate", *argv(tmp_path / "broken", **asked))
    failed = "--lm-eval counting: lm-eval failed (RuntimeError: a task of its own)"
    assert done.returncode != 0 and lines_of(done.stderr, "evaluate") == [failed]
    assert not (tmp_path / "broken").exists()
