"""The embedded default model: made once, by one process at a time, continued where it was stopped."""

import fcntl
import json
import subprocess
import sys

import pytest

import fillm.rank.default_model as default_module
from fillm.errors import InterruptedRun, RunFolderError
from fillm.finetune import finetune_model
from fillm.models import load_model, load_tokenizer
from fillm.rank.console import Console
from fillm.rank.default_model import cache_folder, default_folder, default_model


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """A recipe that takes a moment, the cache in `tmp_path`; the trainings that were asked for."""
    architecture = tmp_path / "config.json"
    architecture.write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}), encoding="utf-8"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": f"Who is number {n}?", "answer": f"Writer {n * n}."}) + "\n" for n in range(12)
        ),
        encoding="utf-8",
    )
    recipe = {"architecture": str(architecture), "vocab_size": 300, "epochs": 1, "batch_size": 2, "device": "cpu"}
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_module, "RECIPE", recipe)
    monkeypatch.setattr(default_module, "DEFAULT_DATA", str(rows))
    asked = []

    def train(data, **settings):
        asked.append(data)
        return finetune_model(data, show=False, **settings)

    monkeypatch.setattr(default_module, "finetune_model", train)
    return asked


def test_it_is_made_once(trainings):
    path = default_model(Console.silent())
    assert path.parent == cache_folder() and len(trainings) == 1
    load_model(str(path), device="cpu")
    load_tokenizer(str(path))
    weights = (path / "model.safetensors").read_bytes()
    assert default_model(Console.silent()) == path and len(trainings) == 1
    assert (path / "model.safetensors").read_bytes() == weights


_HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_waits_for_the_first(trainings, monkeypatch):
    """While another process holds the lock nothing is trained; what it made meanwhile is used."""
    cache_folder().mkdir(parents=True)
    made = default_folder()
    lock = made.parent / f"{made.name}.lock"
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(lock)], stdin=-1, stdout=-1, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        real = fcntl.flock

        def flock(handle, operation):
            with pytest.raises(BlockingIOError):  # the file that is waited for is the one that the other holds
                real(handle, operation | fcntl.LOCK_NB)
            made.mkdir()  # the other process finishes
            holder.stdin.write("\n")
            holder.stdin.flush()
            real(handle, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        assert default_model(Console.silent()) == made
    assert trainings == []


def test_an_interrupted_training_is_continued(trainings, monkeypatch, tmp_path):
    import signal

    from fillm.finetune import training

    whole = default_model(Console.silent())
    weights = (whole / "model.safetensors").read_bytes()
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path / "other"))
    steps = []
    real = training.sample_losses if hasattr(training, "sample_losses") else None
    assert real is not None

    def stopping(*given, **options):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "sample_losses", stopping)
        with pytest.raises(InterruptedRun):
            default_model(Console.silent())
    assert not (cache_folder() / whole.name).exists() and 3 <= len(steps) < 6
    done = len(steps)
    monkeypatch.setattr(training, "sample_losses", lambda *g, **o: (steps.append(1), real(*g, **o))[1])
    path = default_model(Console.silent())
    assert (path / "model.safetensors").read_bytes() == weights and len(steps) - done == 6 - done


def test_a_cache_that_cannot_be_written_is_one_line(trainings, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RunFolderError, match="cannot be written .*; set FILLM_CACHE"):
        default_model(Console.silent())
    assert trainings == []


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FILLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fillm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fillm"
