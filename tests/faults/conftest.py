"""Small inputs of every command, and the command lines that read them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fillm
from fillm.models import load_model
from fillm.rank import ranking_files
from tests.evaluate.conftest import COUNTS, HOLDOUT, rows_of
from tests.faults.forks import main_of
from tests.rank.conftest import question_row, write_rows
from tests.unlearn.conftest import mixed_mask, save_model

ROOT = Path(__file__).resolve().parents[2]
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, forget and retain rows, a mask, an architecture and a data root with the splits of TOFU."""
    work = tmp_path_factory.mktemp("inputs")
    write_rows(work / "forget.jsonl", [question_row(number, 2 + number % 3) for number in range(7)])
    write_rows(work / "retain.jsonl", [question_row(number, 2 + number % 5) for number in range(20, 31)])
    (work / "config.json").write_text(json.dumps(GPT2), encoding="utf-8")
    (work / "data" / "tofu").mkdir(parents=True)
    for split in (*COUNTS, *HOLDOUT):
        write_rows(work / "data" / "tofu" / f"{split}.json", rows_of(split))
    model = load_model(save_model(work / "model"), device="cpu")
    mixed_mask(model).save(work / "mask.safetensors")
    fillm.Mask.whole(model, ["model.layers.0.self_attn.q_proj.weight"]).save(work / "whole.safetensors")
    return work


@pytest.fixture(scope="session")
def lines(inputs: Path) -> dict[str, list[str]]:
    """The command line of every command, its name first; `{at}` stands for the folder of a run."""
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    model = ["--model", f"{inputs}/model", "--device", "cpu"]
    rank = ["rank", *model, *sets, "--tokens-per-batch", "48", "--checkpoint-seconds", "0.001"]
    train = ["--lr", "1e-2", "--batch-size", "4", "--checkpoint-every", "0"]
    unlearn = ["unlearn", *model, *sets, *train, "--mask", f"{inputs}/mask.safetensors", "--max-steps", "4", "--loss"]
    lines = {
        "finetune": ["finetune", "--architecture", f"{inputs}/config.json", "--vocab-size", "300", "--device", "cpu",
                     "--data", f"{inputs}/forget.jsonl", "--epochs", "3", *train],
        "rank": [*rank, "--save-update"],
        "rank in groups": [*rank, "--save-update", "--groups", "3"],
        "rank with a store": [*rank, "--store", "{at}/store", "--compression", "tensorsketch", "--sketch-dim", "128"],
        "unlearn": [*unlearn, "npo"],
        "unlearn with sophia": [*unlearn, "npo", "--optimizer", "sophia", "--gradient-accumulation", "2"],
        "unlearn with bounds": [*unlearn, "ga", "--eval-every", "1", "--stop-retain-loss", "100"],
        "unlearn with adapters": [*unlearn, "grad-diff", "--mask", f"{inputs}/whole.safetensors", "--lora-rank", "2"],
        "evaluate": ["evaluate", *model, "--data-root", f"{inputs}/data", "--forget", "forget01",
                     "--max-new-tokens", "6"],
    }  # fmt: skip
    return {name: [*line, "--out", "{at}/run"] for name, line in lines.items()}


@pytest.fixture(scope="session")
def runs(lines: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By command line, the folder in which it was carried out; what it wrote is in `run` there."""
    work, made = tmp_path_factory.mktemp("runs"), {}
    drawn, ranking_files.score_heatmap = ranking_files.score_heatmap, lambda *given, **options: None
    try:
        for name in ("finetune", "rank", "rank with a store", "unlearn", "evaluate"):
            made[name] = work / name.replace(" ", "-")
            command, *words = [word.replace("{at}", str(made[name])) for word in lines[name]]
            assert main_of(command)(words) == 0
    finally:
        ranking_files.score_heatmap = drawn
    return made


def in_a_process(module: str, *arguments: str, given: Any = None, before: Sequence[str] = ()) -> Any:
    """What a module of this package prints as JSON, run in a process of its own, with `given` as JSON on stdin.

    The words `before` stand in front of its command line.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*before, sys.executable, "-m", f"tests.faults.{module}", *arguments],
        input=json.dumps(given), capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
