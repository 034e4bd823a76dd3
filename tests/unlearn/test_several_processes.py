"""Any number of processes under torchrun unlearns as one does, to rounding, and ends as one; gloo on the CPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from fillm.config import flag_name
from fillm.models import load_model
from fillm.runs.processes import Processes
from fillm.unlearn.__main__ import main
from tests.runs.jobs import lines_of, run_jobs, torchrun
from tests.unlearn.first_gradients import gradients

CASES: dict[str, dict[str, Any]] = {
    "npo": {"loss": "npo", "retain_loss": "kl", "eval_every": 2, "checkpoint_every": 0.0},
    "again": {"loss": "npo", "retain_loss": "kl", "eval_every": 2, "checkpoint_every": 0.0},
    "sophia": {"loss": "npo", "optimizer": "sophia", "batch_size": 2, "stop_forget_loss": 5.6},
    "bfloat16": {"loss": "grad-diff", "mixed_precision": "bf16"},
    "lora": {"loss": "dpo", "lora_rank": 2},
    "task-vector": {"loss": "task-vector", "batch_size": 3, "gradient_accumulation": 2},
    "rmu": {"loss": "rmu", "rmu_layer": 1, "batch_size": 1, "gradient_accumulation": 3},
}


@pytest.fixture(scope="module")
def argv(model_folder: str, mask_file: str, forget_file: str, retain_file: str, make_ranking: Any) -> Any:
    """The arguments of a run into a folder; what it does is said by the folder's name."""
    given = {"model": model_folder, "mask": mask_file, "forget": forget_file, "retain": retain_file, "device": "cpu"}
    given |= {"lr": 1e-2, "max_steps": 4, "batch_size": 4}
    modules = {"mask": None, "ranking": make_ranking("ranking"), "select": "top:0.2:tensors", "include": "mlp,attn"}

    def build(out: Path, **changes: Any) -> list[str]:
        settings = {**given, **(modules if out.name == "lora" else {}), **CASES.get(out.name, CASES["npo"]), **changes}
        named = {**settings, "out": str(out)}
        return [word for name, value in named.items() if value is not None for word in (flag_name(name), str(value))]

    return build


@pytest.fixture(scope="module")
def alone(argv: Callable[..., list[str]], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in CASES:
        assert main(argv(folder / name)) == 0, name
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(str(folder / "model"), device="cpu").named_parameters())


def assert_same(found: Path, wanted: Path) -> None:
    """Two run folders say the same, to the rounding that Adam's division by small numbers leaves of later steps."""
    told = [json.loads((folder / "verification.json").read_text()) for folder in (found, wanted)]
    assert told[0]["outside_mask_bit_equal"]
    loose = 1e-2 if found.name == "bfloat16" else 1e-5
    for which in ("forget_loss", "retain_loss"):
        assert told[0][which]["before"] == pytest.approx(told[1][which]["before"], rel=1e-6)
        assert told[0][which]["after"] == pytest.approx(told[1][which]["after"], rel=loose)
    logs = [pyarrow.parquet.read_table(folder / "log.parquet").to_pylist() for folder in (found, wanted)]
    assert len(logs[0]) == len(logs[1])
    for column in ("gradient_norm", "forget_objective"):
        first = 1e-2 if found.name == "bfloat16" else 1e-6
        assert logs[0][0][column] == pytest.approx(logs[1][0][column], rel=first), (found.name, column)
    if found.name != "bfloat16":
        ours, theirs = weights(found), weights(wanted)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=2e-6, msg=lambda m: f"{found.name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_first_gradient_is_that_of_one_process(processes, one_thread, tmp_path) -> None:
    done = torchrun(processes, "-m", "tests.unlearn.first_gradients", str(tmp_path))
    assert done.returncode == 0, done.stderr
    each = [load_file(tmp_path / str(number)) for number in range(processes)]
    one, exact = (gradients(Processes("cpu", alone=True), 8, dtype) for dtype in (torch.float32, torch.float64))
    for name, wanted in exact.items():
        for other in each[1:]:
            assert torch.equal(each[0][name], other[name]), name
        size = float(wanted.norm())
        assert size > 0.0
        assert float((each[0][name].double() - one[name].double()).norm()) <= 1e-6 * size, name
        # Llama's norms are float32 even in a float64 model.
        assert float((each[0][name].double() - wanted).norm()) <= 1e-5 * size, name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_unlearning_is_that_of_one_process(processes, argv, alone, tmp_path) -> None:
    jobs = [{"command": "unlearn", "argv": argv(tmp_path / name)} for name in CASES]
    codes, said = run_jobs(processes, jobs, tmp_path)
    assert codes == [[0] * processes] * len(jobs), said
    for name in CASES:
        assert_same(tmp_path / name, alone / name)
        assert yaml.safe_load((tmp_path / name / "run.yaml").read_text())["processes"] == processes
    twice = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("npo", "again")]
    assert twice[0] == twice[1]


@pytest.mark.slow
def test_what_ends_one_process_ends_all_and_is_told_once(argv, alone, tmp_path) -> None:
    def job(name: str, *flags: str, changes: dict[str, Any] | None = None, **faults: Any) -> dict[str, Any]:
        return {"command": "unlearn", "argv": [*argv(tmp_path / name, **(changes or {})), *flags], **faults}

    step = {"hook": "gradient of a step"}
    jobs = [
        job("error", **step, fault="error", process=2, at=3),
        job("error", "--resume"),
        job("bug", **step, fault="bug", at=1),
        job("stop", **step, fault="stop", at=3),
        job("stop", "--resume"),
        job("disk", hook="saving a state", fault="disk", process=0),
        job("full", hook="finishing", fault="disk", process=0, at=1),
        job("full", "--resume"),
        job("recording", hook="recording a batch", fault="stop", process=0, at=1),
        job("recording", "--resume"),
        job("drifted", hook="forming of a step", fault="drift", at=4),
        job("range", "--lr", "-1"),
        job("stop"),
        job("other", further=["--num-retain", "5"]),
        job("dry", "--dry-run"),
    ]
    codes, said = run_jobs(3, jobs, tmp_path)
    assert codes == [[code] * 3 for code in (2, 0, 1, 3, 0, 2, 2, 0, 3, 0, 2, 2, 2, 2, 0)], said
    stopped = "after step 3 of 4, saved; continue with --resume"
    unlike = "the processes do not compute the same: give all of them the same files, fillm and hardware"
    assert lines_of(said, "unlearn") == [
        "a number is nan",
        f"stopped by a signal to another process {stopped}",
        "no space left on the disk",
        "no space left on the disk",
        "stopped by SIGTERM before the first step; continue with --resume",
        unlike,
        "--lr -1.0: has to be above 0",
        f"{tmp_path / 'stop'} exists; give --overwrite or another --out",
        unlike,
    ], said
    assert said.count("Fault of ours: a fault of ours") == 1
    assert not any((tmp_path / name).exists() for name in ("bug", "disk", "drifted", "range", "other", "dry"))
    for name in ("error", "stop", "full", "recording"):
        assert_same(tmp_path / name, alone / "npo")


@pytest.mark.slow
def test_the_step_along_u_is_that_of_one_process(argv, one_thread, make_ranking, tmp_path) -> None:
    one_shot = dict.fromkeys(("lr", "max_steps", "batch_size", "eval_every", "retain_loss"))
    one_shot |= {"loss": "influence", "ranking": make_ranking("with u", "--save-update"), "checkpoint_every": 0.0}
    assert main(argv(tmp_path / "alone", **one_shot)) == 0
    run = {name: {"command": "unlearn", "argv": argv(tmp_path / name, **one_shot)} for name in ("dealt", "stopped")}
    stopped = {**run["stopped"], "hook": "gradients of a batch", "fault": "stop", "process": 0, "at": 2}
    again = {"command": "unlearn", "argv": [*argv(tmp_path / "stopped", **one_shot), "--resume"]}
    codes, said = run_jobs(3, [run["dealt"], stopped, again], tmp_path)
    assert codes == [[0] * 3, [3] * 3, [0] * 3], said
    told = {
        name: json.loads((tmp_path / name / "verification.json").read_text()) for name in ("alone", "dealt", "stopped")
    }
    for name in ("dealt", "stopped"):
        assert told[name]["outside_mask_bit_equal"] and told[name]["mask_applied"]
        ours, wanted = told[name]["influence"], told["alone"]["influence"]
        assert ours["eta"] == pytest.approx(wanted["eta"], rel=1e-6)
        for which in ("forget_change", "retain_change"):
            # Measured is the difference of two losses, each within 1e-6.
            loss = told["alone"][which.replace("change", "loss")]["before"]
            assert ours[which].pop("measured") == pytest.approx(wanted[which]["measured"], abs=2e-6 * loss)
            assert ours[which] == pytest.approx({k: v for k, v in wanted[which].items() if k != "measured"}, rel=1e-5)
        for tensor, value in weights(tmp_path / "alone").items():
            torch.testing.assert_close(weights(tmp_path / name)[tensor], value, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_a_killed_process_leaves_a_folder_that_any_number_resumes(argv, alone, one_thread, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    job = {"command": "unlearn", "argv": argv(tmp_path / "run"), "hook": "gradient of a step", "fault": "kill", "at": 3}
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs))
    assert done.returncode != 0
    assert lines_of(done.stderr, "unlearn") == ["another process of the run has died; continue with --resume"]
    assert (tmp_path / "run.partial" / "state.json").is_file() and not (tmp_path / "run").exists()
    shutil.copytree(tmp_path / "run.partial", tmp_path / "again.partial")
    assert main([*argv(tmp_path / "run"), "--resume"]) == 0
    codes, said = run_jobs(3, [{"command": "unlearn", "argv": [*argv(tmp_path / "again"), "--resume"]}], tmp_path)
    assert codes == [[0, 0, 0]], said
    for name in ("run", "again"):
        assert_same(tmp_path / name, alone / "npo")


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_resume_to_the_same_bytes(argv, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    argv_of = {name: argv(tmp_path / name, optimizer="sophia") for name in ("run", "whole")}
    job = {"command": "unlearn", "argv": [*argv_of["run"], "--resume"], "hook": "gradient of a step", "fault": "kill"}
    jobs.write_text(json.dumps([job]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs), restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing to resume; starting anew") == 1  # the first time
    done = torchrun(2, "-m", "fillm.unlearn", *argv_of["whole"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    twice = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in argv_of]
    assert twice[0] == twice[1]


@pytest.mark.slow
def test_an_end_in_the_midst_of_a_curvature_estimate_is_told_once(argv, tmp_path) -> None:
    jobs = tmp_path / "jobs.json"
    job = {"command": "unlearn", "argv": argv(tmp_path / "sophia"), "hook": "curvature of a step"}
    jobs.write_text(json.dumps([{**job, "fault": "error", "at": 1}]), encoding="utf-8")
    done = torchrun(2, "-m", "tests.runs.jobs", str(jobs))
    assert done.returncode != 0
    assert lines_of(done.stderr, "unlearn") == ["a number is nan"], done.stderr
