"""A build of a sketch store that is killed, at whatever moment, ends with the same bytes once it is resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_twenty_kills_at_random_writes_end_with_the_same_bytes(
    model_folder, forget_file, retain_file, tmp_path
) -> None:
    command = ["--model", model_folder, "--forget", forget_file, "--retain", retain_file, "--device", "cpu"]
    command += ["--tokens-per-batch", "48", "--compression", "tensorsketch", "--sketch-dim", "128"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.rank.command_kills", str(tmp_path), "20", *command],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[]] * 20
