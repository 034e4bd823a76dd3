"""Two processes under torchrun do what one does, to rounding; torch.distributed's gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fillm.models import load_model

FLAGS = {"loss": "npo", "retain_loss": "kl", "max_steps": 4, "checkpoint_every": 0.0, "eval_every": 2}


def torchrun(settings, processes, *more):
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "fillm.unlearn"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *words, *flags, *more],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"optimizer": "sophia", "batch_size": 2, "stop_forget_loss": 5.6}])
def test_two_equal_one(changes, settings, unlearn, tmp_path):
    given = {**settings, **FLAGS, **changes}
    one = unlearn(
        "one",
        **given,
    )
    ran = torchrun({**given, "out": str(tmp_path / "two")}, 2)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("run folder") == 1
    told = [json.loads((folder / "verification.json").read_text()) for folder in (one, tmp_path / "two")]
    assert told[1]["outside_mask_bit_equal"]
    for which in ("forget_loss", "retain_loss"):
        for when in ("before", "after"):
            assert told[1][which][when] == pytest.approx(told[0][which][when], rel=1e-6)
    start = dict(load_model(settings["model"], device="cpu").named_parameters())
    both = [dict(load_model(str(f / "model"), device="cpu").named_parameters()) for f in (one, tmp_path / "two")]
    for name, value in both[0].items():
        torch.testing.assert_close(both[1][name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(both[1][name], value) for name, value in start.items())


@pytest.mark.slow
def test_two_resume(settings, tmp_path):
    """Stopped by a signal to one of them, both stop, and both go on."""
    given = {**settings, **FLAGS, "max_steps": 6}
    whole = torchrun({**given, "out": str(tmp_path / "whole")}, 2)
    assert whole.returncode == 0, whole.stderr
    flags = {**given, "out": str(tmp_path / "run")}
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    stopped = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "tests.unlearn.stopped_command", *words],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert stopped.returncode != 0
    assert "saved; continue with --resume" in stopped.stderr
    assert (tmp_path / "run.partial").exists()
    resumed = torchrun(flags, 2, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
