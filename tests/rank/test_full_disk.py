"""A disk that really is full, and a folder that really may not be written to, while a store is built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fillm.rank.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SKETCHED = ("--compression", "countsketch", "--sketch-dim", "1024")
ROW_BYTES = 4 * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_costs_no_stored_row_and_changes_no_byte(model_folder, forget_file, retain_file, tmp_path):
    command = ["--model", model_folder, "--forget", forget_file, "--retain", retain_file, "--device", "cpu"]
    command += ["--tokens-per-batch", "48", *SKETCHED]
    # In the middle of the tenth row, of the fifth, and before the first block, of at least three samples, is whole.
    limits = [int(rows * ROW_BYTES) for rows in (9.5, 4.5, 2.5)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.rank.command_full_disk", str(tmp_path), ",".join(map(str, limits)), *command],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["differ"] == []
    for one in found["refused"]:
        *others, line = one["lines"]
        assert line.startswith("fillm rank: ") and "what was stored before is good" in line
        assert not any(other.startswith(("fillm rank: ", "Traceback")) for other in others)
        assert one["status"] == 2 and not one["run"]
    reasons = ["File too large"] * 3 + ["No space left on device"]
    assert all(reason in one["lines"][-1] for reason, one in zip(reasons, found["refused"], strict=True))
    rows = [one["rows"] for one in found["refused"]]
    assert 6 <= rows[0] <= 9 and 3 <= rows[1] <= 4 and rows[2:] == [0, 0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
@pytest.mark.usefixtures("nothing_drawn")
def test_a_folder_that_may_not_be_written_to(arguments, capsys, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    command = arguments(*SKETCHED, "--store", str(shelf / "store"))
    shelf.chmod(0o500)
    try:
        assert main(command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("fillm rank: ") and "cannot write: Permission denied" in line
    finally:
        shelf.chmod(0o700)
    assert main(command) == 0
