"""SIGKILL at every moment of a build and of an append: readers find whole blocks, and what goes on ends the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_kill_at_any_call_costs_no_stored_row_and_changes_no_byte(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.statistics.store_kills", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    # Kills before the first block, between blocks, between build and append, and after all: what makes the test one.
    assert found["rows"] == [0, 4, 7, 11] and found["calls"] > 60 and found["kills"] > 10
