import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fillm.errors import RunFolderError, UsageError
from fillm.runs import state_files
from fillm.runs.folder import RunFolder

STATE = {"sum": torch.arange(5.0), "q": torch.ones(3, dtype=torch.float64), "done": torch.tensor(True)}


def start(out, overwrite=False, resume=False, **options):
    return RunFolder(out, overwrite=overwrite, resume=resume, **options)


def write(text):
    def writer(folder: Path):
        (folder / "run.yaml").write_text(text, encoding="utf-8")

    return writer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted(out, **options):
    """A run that was stopped after it had saved a state."""
    with start(out, **options) as folder:
        folder.check_identity({"model": "m"})
        folder.save_state("retain", 3, STATE, {"batches": 7})


def test_a_folder_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"--out \S+file/deep/run: \S+file is a file; name a folder in a folder"):
        start(tmp_path / "file" / "deep" / "run")
    assert names(tmp_path) == ["file"]


def test_a_parent_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch):
    def closed(path, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(RunFolderError, match="cannot write: Permission denied; give another --out"):
        start(tmp_path / "closed" / "run")


def test_a_finished_folder_holds_what_was_written_and_nothing_else(tmp_path):
    with start(tmp_path / "deep" / "run") as folder:
        folder.check_identity({"model": "m"})
        folder.save_state("retain", 3, STATE, {})
        folder.save_stage("forget", STATE, {})
        assert not folder.out.exists()
        folder.finish(write("one"))
    assert names(tmp_path / "deep") == ["run"] and names(tmp_path / "deep" / "run") == ["run.yaml"]


def test_out_is_not_there_while_it_is_being_written(tmp_path):
    def writer(path):
        assert not (tmp_path / "run").exists() and names(path) == []
        write("one")(path)

    with start(tmp_path / "run") as folder:
        folder.finish(writer)
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "one"


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "run").mkdir()
    with start(tmp_path / "run") as folder:
        folder.finish(write("one"))
    assert names(tmp_path / "run") == ["run.yaml"]


def test_an_existing_run_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.finish(write("old"))
    with pytest.raises(RunFolderError, match="run exists; give --overwrite or another --out"):
        start(tmp_path / "run")
    with pytest.raises(RunFolderError, match="finished: there is nothing to resume"):
        start(tmp_path / "run", resume=True)

    def fails(path):
        write("new")(path)
        raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"), start(tmp_path / "run", overwrite=True) as folder:
        folder.finish(fails)
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "old"
    with start(tmp_path / "run", overwrite=True) as folder:
        folder.finish(write("new"))
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["run"]


def test_an_interrupted_replacement_resumes_and_replaces(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.finish(write("old"))
    interrupted(tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "old"
    with start(tmp_path / "run", resume=True) as folder:
        assert folder.resumed
        folder.finish(write("new"))
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "new"


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.save_state("retain", 1, STATE, {})
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.yaml").write_text("another's", encoding="utf-8")
        with pytest.raises(RunFolderError, match="has appeared meanwhile"):
            folder.finish(write("mine"))
        assert folder.load_state() is not None
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "another's"


def test_folders_that_no_run_made_are_never_touched(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        start(tmp_path / "home", overwrite=True)
    (tmp_path / "home").rename(tmp_path / "work.partial")
    for option in ("overwrite", "resume"):
        with pytest.raises(RunFolderError, match="is not an unfinished run"):
            start(tmp_path / "work", **{option: True})
    assert (tmp_path / "work.partial" / "letter.txt").read_text(encoding="utf-8") == "dear"
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        start(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="give one"):
        start(tmp_path / "run", overwrite=True, resume=True)


def test_an_unfinished_run_needs_a_decision(tmp_path):
    interrupted(tmp_path / "run")
    with pytest.raises(RunFolderError, match="give --resume to continue it or --overwrite to discard it"):
        start(tmp_path / "run")
    with start(tmp_path / "run", resume=True) as folder:
        assert folder.resumed and folder.load_state() is not None
    with start(tmp_path / "run", overwrite=True) as folder:
        assert not folder.resumed and folder.load_state() is None


def test_nothing_to_resume_starts_anew_and_says_so(tmp_path):
    said = []
    with start(tmp_path / "run", resume=True, notice=said.append) as folder:
        assert not folder.resumed
        folder.finish(write("one"))
    assert len(said) == 1 and "nothing to resume; starting anew" in said[0]


def test_a_run_that_saved_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), start(tmp_path / "run") as folder:
        folder.check_identity({"model": "m"})
        raise KeyError
    assert names(tmp_path) == []


def test_two_runs_exclude_each_other(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.save_state("retain", 1, STATE, {})
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match="another run is at work in it"):
                start(tmp_path / "run", **options)
        assert folder.load_state()[1] == 1


def test_a_killed_run_leaves_its_state_and_no_lock(tmp_path):
    code = (
        "import os, signal, sys, torch\n"
        "from fillm.runs.folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1], overwrite=False, resume=False)\n"
        "folder.check_identity({'model': 'm'})\n"
        "folder.save_state('retain', 2, {'x': torch.ones(3)}, {'a': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    with start(tmp_path / "run", resume=True) as folder:
        folder.check_identity({"model": "m"})
        stage, cursor, tensors, meta = folder.load_state()
    assert (stage, cursor, meta) == ("retain", 2, {"a": 1}) and torch.equal(tensors["x"], torch.ones(3))


def test_states_come_back_to_the_bit_and_the_last_one_counts(tmp_path):
    shared = torch.arange(12.0).reshape(3, 4)
    state = {
        **STATE,
        "view": shared[:, 1:3],
        "all": shared,
        "empty": torch.zeros(0, 4),
        "half": torch.ones(2).bfloat16(),
    }
    with start(tmp_path / "run") as folder:
        assert folder.load_state() is None
        folder.save_state("forget", 1, {"old": torch.ones(1)}, {})
        folder.save_state("retain", 3, state, {"batches": 7})
        stage, cursor, tensors, meta = folder.load_state()
        assert len(list(folder.partial.glob("state.*.safetensors"))) == 1
    assert (stage, cursor, meta) == ("retain", 3, {"batches": 7}) and set(tensors) == set(state)
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def test_equal_states_have_equal_bytes(tmp_path):
    payloads = []
    for run in ("one", "two"):
        with start(tmp_path / run) as folder:
            folder.save_stage("forget", dict(reversed(list(STATE.items())) if run == "two" else STATE.items()), {})
            (path,) = folder.partial.glob("stage-forget.*.safetensors")
            payloads.append(path.read_bytes())
    assert payloads[0] == payloads[1]


def test_finished_stages_are_kept_and_supersede_the_state(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.save_state("forget", 5, {"x": torch.ones(1)}, {})
        folder.save_stage("forget", STATE, {"losses": [0.5]})
        assert folder.load_state() is None and folder.load_stage("retain") is None
    with start(tmp_path / "run", resume=True) as folder:
        tensors, meta = folder.load_stage("forget")
    assert meta == {"losses": [0.5]} and torch.equal(tensors["sum"], STATE["sum"])


@pytest.mark.parametrize("damage", ["payload", "truncated", "missing", "cursor", "json"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    interrupted(tmp_path / "run")
    partial = tmp_path / "run.partial"
    (payload,) = partial.glob("state.*.safetensors")
    record = partial / "state.json"
    if damage == "payload":
        data = bytearray(payload.read_bytes())
        data[-1] ^= 1
        payload.write_bytes(data)
    elif damage == "truncated":
        payload.write_bytes(payload.read_bytes()[:-4])
    elif damage == "missing":
        payload.unlink()
    elif damage == "cursor":
        found = json.loads(record.read_text(encoding="utf-8"))
        found["record"]["cursor"] = 4
        record.write_text(json.dumps(found), encoding="utf-8")
    else:
        record.write_text("{", encoding="utf-8")
    refused = pytest.raises(RunFolderError, match=r"state.*(damaged|missing).*start anew with --overwrite")
    with start(tmp_path / "run", resume=True) as folder, refused as caught:
        folder.load_state()
    assert "\n" not in str(caught.value)


def test_another_model_or_other_data_are_refused_by_name(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.check_identity({"model": "m", "retain data": "r", "settings": "x" * 500 + "damping=0.1"})
        folder.save_state("retain", 3, STATE, {})
    same = {"model": "m", "retain data": "r", "settings": "x" * 500 + "damping=0.1"}
    with start(tmp_path / "run", resume=True) as folder:
        folder.check_identity(same)
        with pytest.raises(RunFolderError, match=r"retain data was r, is s[;)]") as caught:
            folder.check_identity({**same, "retain data": "s"})
        assert "model was" not in str(caught.value)
        with pytest.raises(RunFolderError, match=r"damping=0\.1, is \.\.\.x+damping=0\.2"):
            folder.check_identity({**same, "settings": "x" * 500 + "damping=0.2"})
        with pytest.raises(RunFolderError, match="adapter was not there"):
            folder.check_identity({**same, "adapter": "a"})
        (folder.partial / "identity.json").unlink()
        with pytest.raises(RunFolderError, match=r"identity\.json: missing"):
            folder.check_identity(same)


def test_a_disk_that_refuses_leaves_the_state_before_good(tmp_path):
    with start(tmp_path / "run") as folder:
        folder.save_state("retain", 1, STATE, {})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # no file may grow beyond 64 KiB
        try:
            with pytest.raises(
                RunFolderError, match=r"cannot write: .*what was saved before is good.*--resume"
            ) as caught:
                folder.save_state("retain", 2, {"x": torch.zeros(1 << 20)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "\n" not in str(caught.value)
        assert not list(folder.partial.glob("*.tmp"))
        assert folder.load_state()[1] == 1
        folder.save_state("retain", 2, {"x": torch.zeros(1 << 20)}, {})
        assert folder.load_state()[1] == 2
        folder.finish(write("one"))
    assert names(tmp_path / "run") == ["run.yaml"]


@pytest.mark.parametrize("save", ["save_state", "save_stage"])
def test_a_disk_that_is_full_at_the_first_save_claims_no_earlier_one(tmp_path, monkeypatch, save):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_files, "save_file", full)
    with start(tmp_path / "run") as folder:
        given = ("retain", 1) if save == "save_state" else ("retain",)
        with pytest.raises(RunFolderError, match="nothing was saved: see to that, then start it again$") as caught:
            getattr(folder, save)(*given, STATE, {})
        assert "--resume" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_disk_that_is_full_at_the_end_leaves_the_run_resumable(tmp_path):
    def full(path):
        raise OSError(28, "No space left on device")

    with start(tmp_path / "run") as folder:
        folder.save_stage("retain", STATE, {})
        with pytest.raises(RunFolderError, match="No space left on device"):
            folder.finish(full)
    assert not (tmp_path / "run").exists()
    with start(tmp_path / "run", resume=True) as folder:
        assert folder.load_stage("retain") is not None
        folder.finish(write("one"))
    assert names(tmp_path) == ["run"]


def test_a_run_stopped_before_the_last_rename_keeps_its_stages(tmp_path, monkeypatch):
    with start(tmp_path / "run") as folder:
        folder.finish(write("old"))
    real, calls = os.replace, []

    def stops(source, target):
        if Path(source).name == "final":
            calls.append(target)
            raise KeyboardInterrupt
        real(source, target)

    with pytest.raises(KeyboardInterrupt), start(tmp_path / "run", overwrite=True) as folder:
        folder.save_stage("retain", STATE, {})
        monkeypatch.setattr(os, "replace", stops)
        folder.finish(write("new"))
    monkeypatch.undo()
    # Killed between the two renames: the old folder lies aside, and comes back.
    assert calls and not (tmp_path / "run").exists()
    with start(tmp_path / "run", resume=True) as folder:
        assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "old"
        assert folder.load_stage("retain") is not None
        folder.finish(write("new"))
    assert (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8") == "new" and names(tmp_path) == ["run"]


def test_what_a_run_stopped_after_the_last_rename_left_is_cleared(tmp_path, monkeypatch):
    with start(tmp_path / "run") as folder:
        folder.save_stage("retain", STATE, {})
        with monkeypatch.context() as patch:
            patch.setattr(folder, "_clear", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                folder.finish(write("one"))
    assert names(tmp_path) == ["run", "run.partial"]
    with pytest.raises(RunFolderError, match="finished: there is nothing to resume"):
        start(tmp_path / "run", resume=True)
    with start(tmp_path / "run", overwrite=True) as folder:
        assert folder.load_stage("retain") is None
        folder.finish(write("two"))
    assert names(tmp_path) == ["run"]


def test_payloads_are_plain_safetensors(tmp_path):
    interrupted(tmp_path / "run")
    (payload,) = (tmp_path / "run.partial").glob("state.*.safetensors")
    assert torch.equal(load_file(payload)["sum"], STATE["sum"])


def test_what_the_writer_returns_comes_back_and_its_files_are_as_readable_as_the_record(tmp_path):
    def writer(path):
        write("one")(path)
        (path / "deep").mkdir()
        for private in (path / "weights.safetensors", path / "deep" / "weights.safetensors"):
            private.touch(mode=0o600)
        return "written"

    with start(tmp_path / "run") as folder:
        assert folder.finish(writer) == "written"
    modes = {path.stat().st_mode for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "run" / "run.yaml").stat().st_mode}


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with start("~/run") as folder:
        folder.finish(write("one"))
    assert names(tmp_path / "run") == ["run.yaml"]
