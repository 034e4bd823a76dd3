"""A disk that is full, or may only be read: one line, nothing saved is lost, `--resume` ends with the same bytes."""

import subprocess
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.faults.conftest import in_a_process
from tests.faults.forks import main_of


def cramped(lines, folder, shares):
    """Runs each command on disks of a share of the room that it takes, and checks how it ends."""
    trial = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]  # gone with the process
    try:
        subprocess.run(trial, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    cases = [
        {"name": name, "command": lines[name][0], "arguments": lines[name][1:], "shares": shares[name]}
        for name in shares
    ]
    found = in_a_process("full_disks", str(folder), given=cases, before=("unshare", "-rm"))
    for name, runs in found.items():
        for run in runs:
            assert run["status"] == 2, (name, run)
            assert run["said"][-1].startswith(f"fillm {lines[name][0]}: "), (name, run)
            reason = "No space left on device" if run["share"] else "Read-only file system"
            assert "cannot write: " in run["said"][-1] and reason in run["said"][-1], (name, run)
            assert not any(line.startswith("Traceback") for line in run["said"]), (name, run)
            assert not run["half"] and run["again"] == 0 and run["differ"] == [], (name, run)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_disks_that_are_full_early_and_late(lines, tmp_path):
    shares = [0, 0.3, 0.7, 0.95]
    cramped(lines, tmp_path, {name: shares for name in lines})


@pytest.mark.parametrize("command", ["finetune", "unlearn"])
def test_a_tokenizer_that_finds_no_room_leaves_the_run_resumable(command, lines, tmp_path, monkeypatch, capsys):
    """The library tokenizers raises a bare `Exception` for it."""
    name, *words = [word.replace("{at}", str(tmp_path)) for word in lines[command]]

    def full(tokenizer, folder, **options):
        Path(folder, "tokenizer.json").symlink_to("/dev/full")
        saved(tokenizer, folder, **options)

    with monkeypatch.context() as patch:
        saved = PreTrainedTokenizerBase.save_pretrained
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        assert main_of(name)(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot write: No space left on device" in line and line.endswith("then give --resume")
    assert not (tmp_path / "run").exists()
    assert main_of(name)([*words, "--resume"]) == 0
