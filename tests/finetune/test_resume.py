"""A run that dies at any moment continues to the bytes of an uninterrupted one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fillm.errors import InterruptedRun, RunFolderError
from fillm.finetune import run, training
from fillm.finetune.__main__ import main
from fillm.runs import RunFolder, state_files
from fillm.runs.folder import os as folder_os


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


def _gone(folder):
    """What the kernel does for a folder whose process is killed: its lock goes, every file stays."""
    if folder._lock is not None:
        os.close(folder._lock)
        folder._lock = None


def _bytes(result):
    return (result.folder / "model.safetensors").read_bytes()


def _die_at_call(monkeypatch, where, name, call, after=False):
    """Makes the `call`-th call of `where.name` die, before or after doing its work, with nothing tidied up."""
    real, calls = getattr(where, name), []
    monkeypatch.setattr(RunFolder, "close", _gone)

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Killed
        out = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return out

    monkeypatch.setattr(where, name, dying)


# Moments: in the middle of a step; a checkpoint written but not yet in its place; its tensors in their place but not
# named yet; in its place; the first of all; the model saved or half saved; all files there but the name; the new folder
# in its place and the old one, with the states, still to be deleted.
MOMENTS = [
    (training, "sample_losses", 6, False),
    (state_files, "save_file", 4, True),
    (RunFolder, "save_state", 2, False),
    (state_files, "write_json", 4, False),
    (training, "save_checkpoint", 3, True),
    (training, "save_checkpoint", 1, False),
    (torch.optim.AdamW, "step", 5, True),
    (run, "write_log", 1, False),
    (run, "write_record", 1, True),
    (RunFolder, "_put_in_place", 1, False),
    (RunFolder, "_put_in_place", 1, True),
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
    if name == "_put_in_place" and after:  # only what is no longer needed was still to be deleted
        assert _bytes_at(tmp_path / "out") == _bytes(whole)
        with pytest.raises(RunFolderError, match="finished: there is nothing to resume"):
            train("out", resume=True, **settings)
        return
    assert _bytes_at(tmp_path / "out") == _bytes_at(tmp_path / "old")
    with pytest.raises(RunFolderError, match="out exists; give --overwrite"):
        train("out", **settings)
    resumed = train("out", resume=True, **settings)
    assert _bytes(resumed) == _bytes(whole)
    assert resumed.epoch_losses == whole.epoch_losses
    assert not (tmp_path / "out.partial").exists()


def _bytes_at(folder):
    return (folder / "model.safetensors").read_bytes()


def test_killed_between_the_two_renames_of_a_replacement(train, monkeypatch, tmp_path):
    whole, old = train("whole"), train("out", seed=5)
    before, real = _bytes(old), folder_os.replace

    def dying(source, target):
        if Path(source).name == "final":
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folder_os, "replace", dying)
        patch.setattr(RunFolder, "close", _gone)
        with pytest.raises(Killed):
            train("out", overwrite=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunFolderError, match="unfinished run; give --resume to continue it or --overwrite to discard"):
        train("out")
    assert _bytes_at(tmp_path / "out") == before
    assert _bytes(train("out", resume=True)) == _bytes(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_sigkill_of_the_real_process(train, data, architecture, tmp_path):
    whole = train("whole", checkpoint_every=0.0)
    code = f"""
import os, signal, sys
import torch
torch.set_num_threads({torch.get_num_threads()})
import fillm.runs.state_files as state_files
real, calls = os.replace, []
def replace(source, target):
    calls.append(target)
    if str(target).endswith("state.json") and len(calls) > 7:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
state_files.os.replace = replace
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
    assert err.splitlines()[-1] == (
        f"fillm finetune: stopped by {signal.Signals(number).name} after step 5 of 9, saved; continue with --resume"
    )
    assert main([*argv]) == 2
    assert "give --resume to continue it" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert "continued at step 5" in capsys.readouterr().err
    assert _bytes_at(tmp_path / "out") == _bytes(whole)


def test_interrupted_after_an_epoch_below_the_target(train, monkeypatch):
    with monkeypatch.context() as patch:
        _die_at_call(patch, run, "write_log", 1)
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
    with pytest.raises(RunFolderError, match=r"made from something else \(--lr was 0\.01, is 0\.02\)"):
        train("out", resume=True, lr=2e-2)


def test_another_number_of_threads_is_refused(train, monkeypatch):
    """It would end with other bytes."""
    _interrupt(train, monkeypatch)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(RunFolderError, match=rf"\(threads was {threads}, is {threads + 1}\)"):
        train("out", resume=True)


def test_another_kind_of_device_is_refused_and_another_name_of_it_is_not(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    path = tmp_path / "out.partial" / "identity.json"
    identity = state_files.read_json(path)
    state_files.write_json(path, {**identity, "device": "cuda"})
    with pytest.raises(RunFolderError, match=r"\(device was cuda, is cpu\)"):
        train("out", resume=True)
    state_files.write_json(path, identity)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train("out", resume=True, device="auto").steps == 9


def test_other_data_are_refused(train, data, monkeypatch):
    _interrupt(train, monkeypatch)
    text = Path(data).read_text()
    Path(data).write_text(text.replace("Oslo", "Bern"))
    with pytest.raises(RunFolderError, match=r"made from something else \(data fingerprint was "):
        train("out", resume=True)


def test_damaged_checkpoint_is_refused(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    [path] = (tmp_path / "out.partial").glob("state.*.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-40], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError, match=rf"{path.name}: damaged .*start anew with --overwrite"):
            train("out", resume=True)


def test_foreign_checkpoint_is_refused(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    with RunFolder(tmp_path / "out", overwrite=False, resume=True) as folder:
        folder.save_state("training", 1, {"x": torch.zeros(2)}, {"micro_batch": 4})
    with pytest.raises(RunFolderError, match=r"made from another model \(differs in exp_avg/"):
        train("out", resume=True)


def test_damaged_record_is_refused(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    for text in ("{", "3"):
        (tmp_path / "out.partial" / "identity.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"identity.json: damaged .*start anew with --overwrite"):
            train("out", resume=True)


def test_a_full_disk_loses_nothing(train, monkeypatch):
    whole, calls, real = train("whole"), [], state_files.save_file

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(state_files, "save_file", full)
        with pytest.raises(RunFolderError, match="No space left on device.*--resume"):
            train("out", checkpoint_every=0.0)
    assert _bytes(train("out", resume=True)) == _bytes(whole)


def test_a_disk_that_is_full_at_the_end_loses_nothing(train, monkeypatch, tmp_path):
    whole = train("whole")

    def full(log, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_log", full)
        with pytest.raises(RunFolderError, match="No space left on device.*--resume"):
            train("out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(training, "sample_losses", None)  # nothing is left to be trained
    assert _bytes(train("out", resume=True)) == _bytes(whole)


def test_two_trainings_of_one_folder_exclude_each_other(train, tmp_path):
    with RunFolder(tmp_path / "out", overwrite=False, resume=False):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match="another run is at work in it"):
                train("out", **flags)


def test_no_pickle_is_written_or_read(train, monkeypatch, tmp_path):
    def refused(*_, **__):
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", refused)
    monkeypatch.setattr(torch, "load", refused)
    _interrupt(train, monkeypatch)
    kept = {path.name for path in (tmp_path / "out.partial").iterdir()}
    [payload] = {name for name in kept if name.startswith("state.") and name.endswith(".safetensors")}
    assert kept == {payload, "state.json", "identity.json", "intent.json", "lock"}
    train("out", resume=True)


def test_interrupted_run_is_resumable_by_its_exit_code():
    assert InterruptedRun.exit_code == 3


def test_resume_alone_is_no_leave_to_replace(train, monkeypatch, tmp_path):
    _interrupt(train, monkeypatch)
    shutil.copytree(train("other", seed=5).folder, tmp_path / "out")
    with pytest.raises(RunFolderError, match="out is finished: there is nothing to resume"):
        train("out", resume=True)
