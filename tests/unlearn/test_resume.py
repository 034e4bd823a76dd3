"""A run that stops at any moment continues to the bytes of an uninterrupted one."""

import os
import shutil
import signal
from pathlib import Path

import pytest

import fillm
from fillm.errors import InterruptedRun, RunFolderError
from fillm.models import load_model, load_tokenizer
from fillm.runs import RunFolder, state_files
from fillm.unlearn import gradients, reference, results, training
from fillm.unlearn.curvature import CurvatureAlong
from fillm.unlearn.masked_optimizer import MaskedOptimizer

NEVER = {"checkpoint_every": 0.0}
WHOLE = {
    "plain": {},
    "sophia": {"optimizer": "sophia", "loss": "npo", "gradient_accumulation": 2},
    "best": {"loss": "ga", "stop_retain_loss": 100.0, "eval_every": 1},
    "task-vector": {"loss": "task-vector"},
}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test catches it."""


def files(folder):
    """Every file of a run but the record of when it ran and the log, which holds seconds."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in ("run.yaml", "log.parquet")
    }


def die_at_call(monkeypatch, where, name, call, after):
    """Makes the `call`-th call of `where.name` die, before or after doing its work, with nothing tidied up."""
    real, calls = getattr(where, name), []

    def gone(folder):
        """What the kernel does for a folder whose process is killed: its lock goes, every file stays."""
        if folder._lock is not None:
            os.close(folder._lock)
            folder._lock = None

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Killed
        out = real(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return out

    monkeypatch.setattr(RunFolder, "close", gone)
    monkeypatch.setattr(where, name, dying)


# Moments: before anything is saved; in the recording of the reference; in the middle of a step; between a step and its
# checkpoint; a checkpoint half written; in its place; in the last evaluation; in the writing of the folder.
MOMENTS = [
    (RunFolder, "save_stage", 1, False),
    (reference, "record", 1, False),
    (gradients.StepGradients, "_backward", 3, False),
    (MaskedOptimizer, "step", 2, True),
    (state_files, "save_file", 5, True),
    (training, "save_checkpoint", 2, True),
    (training, "save_checkpoint", 4, False),
    (results, "write_log", 1, False),
    (results, "write_record", 1, True),
    (RunFolder, "_put_in_place", 1, False),
]


CASES = [("sophia", *moment) for moment in MOMENTS]
CASES += [(kind, *MOMENTS[place]) for kind in ("plain", "best", "task-vector") for place in (2, 5, 7)]


@pytest.mark.parametrize(
    ("kind", "where", "name", "call", "after"), CASES, ids=[f"{c[0]}-{c[2]}-{c[3]}" for c in CASES]
)
def test_killed_then_resumed(kind, where, name, call, after, unlearn, monkeypatch, tmp_path):
    given = {**NEVER, **WHOLE[kind], "max_steps": 5}
    whole = files(unlearn("whole", **given))
    with monkeypatch.context() as patch:
        die_at_call(patch, where, name, call, after)
        with pytest.raises(Killed):
            unlearn("run", **given)
    assert not (tmp_path / "run").exists()
    assert files(unlearn("run", resume=True, **given)) == whole
    assert not (tmp_path / "run.partial").exists()


@pytest.mark.parametrize("moment", [(training, "save_checkpoint", 2, True), (results, "write_log", 1, False)])
def test_bfloat16_and_lora(moment, unlearn, model_folder, monkeypatch, tmp_path):
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    fillm.Mask.whole(load_model(model_folder, device="cpu"), names).save(tmp_path / "two.safetensors")
    narrow = tmp_path / "narrow"
    load_model(model_folder, dtype="bfloat16", device="cpu").save_pretrained(narrow)
    shutil.copy(Path(model_folder) / "tokenizer.json", narrow)
    shutil.copy(Path(model_folder) / "tokenizer_config.json", narrow)
    for number, changes in enumerate(({"lora_rank": 2}, {"model": str(narrow), "lr": 1e-3})):
        given = {**NEVER, "mask": str(tmp_path / "two.safetensors"), **changes}
        whole = files(unlearn(f"whole{number}", **given))
        with monkeypatch.context() as patch:
            die_at_call(patch, *moment)
            with pytest.raises(Killed):
                unlearn(f"run{number}", **given)
        assert files(unlearn(f"run{number}", resume=True, **given)) == whole


@pytest.mark.parametrize(
    "moment",
    [(results, "write_log", 1, False), *((CurvatureAlong, "run", call, True) for call in (1, 2))],
)
def test_influence(moment, make_ranking, unlearn, monkeypatch):
    given = {
        "mask": None, "lr": None, "max_steps": None, "batch_size": None, "loss": "influence", **NEVER,
        "ranking": make_ranking("updates", "--save-update"), "select": "top:0.5",
    }  # fmt: skip
    whole = files(unlearn("whole", **given))
    with monkeypatch.context() as patch:
        die_at_call(patch, *moment)
        with pytest.raises(Killed):
            unlearn("run", **given)
    assert files(unlearn("run", resume=True, **given)) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_first(number, unlearn, monkeypatch):
    whole = files(unlearn("whole", max_steps=5))
    real, steps = MaskedOptimizer.step, []

    def step(optimizer):
        steps.append(None)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return real(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(MaskedOptimizer, "step", step)
        with pytest.raises(InterruptedRun, match=f"stopped by {number.name} after step 2 of 5, saved"):
            unlearn("run", max_steps=5)
    assert len(steps) == 2
    with monkeypatch.context() as patch:
        patch.setattr(MaskedOptimizer, "step", lambda optimizer: steps.append(None) or real(optimizer))
        assert files(unlearn("run", max_steps=5, resume=True)) == whole
    assert len(steps) == 5


def test_resumed_with_something_else(unlearn, monkeypatch):
    with monkeypatch.context() as patch:
        die_at_call(patch, training, "save_checkpoint", 2, True)
        with pytest.raises(Killed):
            unlearn("run", **NEVER)
    with pytest.raises(RunFolderError, match="--lr was 0.01, is 0.02"):
        unlearn("run", resume=True, lr=0.02, **NEVER)
    unlearn("run", resume=True, **NEVER)


def test_folder_of_a_function(model_folder, mask_file, forget_file, retain_file):
    """Without `out`, nothing is left anywhere, and nothing is saved on the way."""
    model = load_model(model_folder, device="cpu")
    before = set(Path.cwd().iterdir())
    result = fillm.unlearn_model(
        model,
        load_tokenizer(model_folder),
        forget_file,
        retain_file,
        mask=fillm.Mask.load(mask_file),
        max_steps=1,
        lr=1e-2,
    )
    assert result.steps == 1 and set(Path.cwd().iterdir()) == before
