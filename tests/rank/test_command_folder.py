"""Run folders that are there already, unfinished, damaged, foreign, or on a disk that refuses; through the command."""

import errno
import os
import shutil
import signal

import pytest
import yaml
from safetensors.torch import load_file, save_file

import fillm.rank.command as command
import fillm.runs.state_files as state_files
from fillm.capture import Capture
from fillm.errors import InterruptedRun
from fillm.rank.__main__ import main
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.runs import RunFolder
from fillm.statistics import MeanGradient
from tests.families import build_family
from tests.rank.direct import FORGET


def assert_same_results(one, other):
    for name in ("ranking.parquet", "ranking.csv", "samples.parquet", "update.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture
def interrupted(arguments, monkeypatch, capsys, tmp_path):
    """An unfinished run at `tmp_path/run`, stopped after its first batch."""
    batch = Passes._batch

    def stopping(self, *given):
        signal.raise_signal(signal.SIGTERM)
        return batch(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Passes, "_batch", stopping)
        assert main(arguments()) == 3
    assert (tmp_path / "run.partial" / "state.json").is_file()
    capsys.readouterr()
    return tmp_path / "run.partial"


def test_an_existing_out_is_refused_and_overwrite_replaces_it(arguments, capsys, fails, tmp_path):
    assert main(arguments(method="random")) == 0
    capsys.readouterr()
    assert "run exists; give --overwrite or another --out" in fails(arguments(method="random"))
    assert "nothing to resume" in fails(arguments("--resume", method="random"))
    assert main(arguments("--overwrite", method="none")) == 0
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert record["ranking"]["method"] == "none"


def test_a_folder_of_somebody_else_is_never_replaced(arguments, fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert "is not a run folder" in fails(arguments("--overwrite"))


def test_resume_with_nothing_there_starts_anew(arguments, capsys, tmp_path):
    assert main(arguments("--resume", method="random")) == 0
    assert "nothing to resume; starting anew" in capsys.readouterr().err
    assert (tmp_path / "run" / "ranking.parquet").is_file()


def test_an_unfinished_run_is_not_thrown_away(arguments, fails, interrupted):
    assert "give --resume to continue it or --overwrite to discard it" in fails(arguments())


def test_other_settings(arguments, fails, interrupted):
    line = fails(arguments("--resume", "--damping", "0.2"))
    assert "--damping was 0.1, is 0.2" in line and "--seed" not in line


def test_other_data(arguments, fails, interrupted, tmp_path, forget_file):
    line = fails(arguments("--resume", forget=f"{forget_file}[1:]"))
    assert "forget fingerprint was" in line and "retain fingerprint" not in line


def test_another_model(arguments, fails, interrupted, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model fingerprint was" in fails(arguments("--resume", model=str(folder)))


@pytest.mark.parametrize("which", ["state.json", "state.*.safetensors"])
def test_a_damaged_state(arguments, capsys, interrupted, which):
    path = next(interrupted.glob(which))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(arguments("--resume")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert path.name in line and "damaged" in line and "--overwrite" in line


def test_a_parent_that_is_a_file(arguments, fails, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    line = fails(arguments(out=str(tmp_path / "file" / "run")))
    assert line.endswith("file is a file; name a folder in a folder")


def test_a_folder_that_must_not_be_written(arguments, fails, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "Permission denied" in fails(arguments(out=str(tmp_path / "locked" / "run")))


def test_a_disk_that_fills_up_while_a_state_is_saved(arguments, monkeypatch, capsys, tmp_path):
    reference = arguments("--save-update", "--checkpoint-seconds", "0.000001", out=str(tmp_path / "whole"))
    assert main(reference) == 0
    argv = arguments("--save-update", "--checkpoint-seconds", "0.000001")
    saves, save_file_ = [], state_files.save_file

    def filling(tensors, path):
        saves.append(path)
        if len(saves) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file_(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(state_files, "save_file", filling)
        capsys.readouterr()
        assert main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in line and "give --resume" in line
    assert main([*argv, "--resume"]) == 0
    assert_same_results(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_fills_up_at_the_end(arguments, monkeypatch, capsys, tmp_path):
    def full(ranking, folder):
        (folder / "ranking.parquet").write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_files", full)
        assert main(arguments()) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert main(arguments("--resume")) == 0


def test_a_tensor_sent_to_the_fallback_midway_is_there_still_on_resume(tmp_path):
    """Else the batches that are left would go by the rules: other last bits, and no note."""
    model, name = build_family("llama"), "model.norm.weight"

    def go(resume, interrupted, fallback):
        capture = Capture(model, [name], fallback=fallback)
        with RunFolder(tmp_path / "out", overwrite=False, resume=resume) as folder:
            passes = Passes(Console.silent(), tokens_per_batch=1, folder=folder)
            passes._interrupted = lambda: interrupted
            passes.run("forget", "forget pass", capture, FORGET, MeanGradient(capture.parameters, len(FORGET)))
        return capture.fallback

    met = {name: "no rule for einsum"}
    with pytest.raises(InterruptedRun):
        go(False, "SIGTERM", met)
    assert go(True, None, None) == met
