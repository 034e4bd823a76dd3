"""A run that dies at any moment continues to the bytes of an uninterrupted one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fillm.finetune.folder as run_folder
from fillm.errors import InterruptedRun, RunFolderError
from fillm.finetune import checkpoint, training
from fillm.finetune.__main__ import main


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


def _bytes(result):
    return (result.folder / "model.safetensors").read_bytes()


def _die_at_call(monkeypatch, where, name, call, after=False):
    """Makes the `call`-th call of `where.name` die, before or after doing its work."""
    real, calls = getattr(where, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Killed
        out = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return out

    monkeypatch.setattr(where, name, dying)


# Moments: in the middle of a step; a checkpoint written but not yet in its place; in its place; the first of all; the
# model saved or half saved; all files there but the name; the old folder moved away and the new one not yet there.
MOMENTS = [
    (training, "sample_losses", 6, False),
    (checkpoint, "save_file", 4, True),
    (training, "save_checkpoint", 3, True),
    (training, "save_checkpoint", 1, False),
    (torch.optim.AdamW, "step", 5, True),
    (run_folder.RunFolder, "write_log", 1, False),
    (run_folder.RunFolder, "publish", 1, False),
    (run_folder.os, "rename", 2, False),
    (run_folder.shutil, "rmtree", 1, False),
]


@pytest.mark.parametrize(("where", "name", "call", "after"), MOMENTS, ids=[f"{m[1]}-{m[2]}" for m in MOMENTS])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_then_resumed(where, name, call, after, lora, train, monkeypatch, tmp_path):
    settings = {"checkpoint_every": 0.0}
    if lora:
        settings |= {"model": str(train("base").folder), "vocab_size": None, "lora_rank": 2}
    whole = train("whole", **settings)
    shutil.copytree(train("out", seed=5, **settings).folder, tmp_path / "old")
    with monkeypatch.context() as patch:
        _die_at_call(patch, where, name, call, after)
        with pytest.raises(Killed):
            train("out", overwrite=True, **settings)
    if name == "rmtree":  # only the old folder was still to be deleted
        assert _bytes_at(tmp_path / "out") == _bytes(whole)
        return
    assert name == "rename" or _bytes_at(tmp_path / "out") == _bytes_at(tmp_path / "old")
    with pytest.raises(RunFolderError, match=r"exists already|an interrupted run"):
        train("out", **settings)
    resumed = train("out", resume=True, **settings)
    assert _bytes(resumed) == _bytes(whole)
    assert resumed.epoch_losses == whole.epoch_losses
    assert not (tmp_path / "out.partial").exists()


def _bytes_at(folder):
    return (folder / "model.safetensors").read_bytes()


def test_sigkill_of_the_real_process(train, data, architecture, tmp_path):
    whole = train("whole", checkpoint_every=0.0)
    code = f"""
import os, signal, sys
import torch
torch.set_num_threads({torch.get_num_threads()})
import fillm.finetune.checkpoint as checkpoint
real, calls = os.replace, []
def replace(source, target):
    calls.append(target)
    if str(target).endswith("checkpoint.safetensors") and len(calls) > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
checkpoint.os.replace = replace
from fillm.finetune.__main__ import main
main(sys.argv[1:])
"""
    flags = f"--vocab-size 300 --epochs 3 --batch-size 4 --lr 1e-2 --device cpu --checkpoint-every 0 --data {data}"
    argv = [*flags.split(), "--architecture", architecture, "--out", str(tmp_path / "out")]
    root = str(Path(__file__).parents[2])
    ended = subprocess.run([sys.executable, "-c", code, *argv], cwd=root, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists()
    resumed = train("out", resume=True)
    assert _bytes(resumed) == _bytes(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_3(number, train, data, architecture, tmp_path, monkeypatch, capsys):
    whole = train("whole")
    argv = f"--vocab-size 300 --epochs 3 --batch-size 4 --lr 1e-2 --device cpu --data {data}".split()
    argv += ["--architecture", architecture, "--out", str(tmp_path / "out")]
    real, calls = training.sample_losses, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return real(*args)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(training, "sample_losses", signalled)
        assert main(argv) == 3
    assert signal.getsignal(number) is handler
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == ("fillm finetune: stopped after step 5 of 9, saved; continue with --resume")
    assert main([*argv]) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert "continued at step 5" in capsys.readouterr().err
    assert _bytes_at(tmp_path / "out") == _bytes(whole)


def test_interrupted_after_an_epoch_below_the_target(train, monkeypatch):
    with monkeypatch.context() as patch:
        _die_at_call(patch, run_folder.RunFolder, "write_log", 1)
        with pytest.raises(Killed):
            train("out", target_loss=100.0)
    resumed = train("out", target_loss=100.0, resume=True)
    assert resumed.steps == 3


def test_resume_without_anything_begun_is_a_new_run(train):
    assert train("out", resume=True).fingerprint == train("other").fingerprint


def _interrupt(train, monkeypatch, **settings):
    with monkeypatch.context() as patch:
        _die_at_call(patch, training, "sample_losses", 6)
        with pytest.raises(Killed):
            train("out", checkpoint_every=0.0, **settings)


def test_other_settings_are_refused_by_name(train, monkeypatch):
    _interrupt(train, monkeypatch)
    with pytest.raises(RunFolderError, match="begun with --lr 0.01, not 0.02"):
        train("out", resume=True, lr=2e-2)


def test_other_data_are_refused(train, data, monkeypatch):
    _interrupt(train, monkeypatch)
    text = Path(data).read_text()
    Path(data).write_text(text.replace("Oslo", "Bern"))
    with pytest.raises(RunFolderError, match="data changed since it began"):
        train("out", resume=True)


def test_damaged_checkpoint_is_refused(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    path = tmp_path / "out.partial" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RunFolderError, match="damaged checkpoint"):
        train("out", resume=True)


def test_foreign_checkpoint_is_refused(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    path = tmp_path / "out.partial" / "checkpoint.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, metadata={"step": "1", "micro_batch": "4"})
    with pytest.raises(RunFolderError, match="made from another model"):
        train("out", resume=True)


def test_damaged_record_is_refused(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    (tmp_path / "out.partial" / "run.yaml").write_text("settings: [")
    with pytest.raises(RunFolderError, match="run.yaml: cannot be read"):
        train("out", resume=True)
    (tmp_path / "out.partial" / "run.yaml").write_text("3")
    with pytest.raises(RunFolderError, match="not a run's record"):
        train("out", resume=True)


def test_a_full_disk_loses_nothing(train, monkeypatch):
    whole, calls, real = train("whole"), [], checkpoint.save_file

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(RunFolderError, match="No space left on device.*--resume"):
            train("out", checkpoint_every=0.0)
    assert _bytes(train("out", resume=True)) == _bytes(whole)


def test_no_pickle_is_written_or_read(train, monkeypatch, tmp_path):
    def refused(*_, **__):
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", refused)
    monkeypatch.setattr(torch, "load", refused)
    _interrupt(train, monkeypatch)
    kept = {path.name for path in (tmp_path / "out.partial").iterdir()}
    assert kept == {"checkpoint.safetensors", "run.yaml", "tokenizer.json", "tokenizer_config.json"}
    train("out", resume=True)


def test_interrupted_run_is_resumable_by_its_exit_code():
    assert InterruptedRun.exit_code == 3


def test_resume_alone_is_no_leave_to_replace(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    shutil.copytree(train("other", seed=5).folder, tmp_path / "out")
    with pytest.raises(RunFolderError, match="exists already"):
        train("out", resume=True)
