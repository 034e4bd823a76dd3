"""A data root with a benchmark in the layout of TOFU, in the words of a small tokenizer, and two saved models."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fillm.config import flag_name, from_mapping
from fillm.evaluate.__main__ import main
from fillm.evaluate.command import run
from fillm.evaluate.config import EvaluateConfig
from tests.families import build_family
from tests.rank.conftest import WORDS, word_tokenizer, write_rows

COUNTS = {"forget01_perturbed": 7, "retain_perturbed": 6, "real_authors_perturbed": 5, "world_facts_perturbed": 4}
HOLDOUT = {"holdout01": 5}


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def rows_of(split: str) -> list[dict[str, Any]]:
    """Rows of a split; how many words an answer has differs from row to row."""
    draw = random.Random(split)
    made = []
    for number in range({**COUNTS, **HOLDOUT}[split]):
        row: dict[str, Any] = {"question": words(draw, 2 + 3 * number % 7), "answer": words(draw, 1 + number % 5)}
        wrong = 3
        if split.startswith(("forget", "retain")):
            row["paraphrased_answer"], wrong = words(draw, 2 + number % 4), 5
        row["perturbed_answer"] = [words(draw, 1 + (number + other) % 4) for other in range(wrong)]
        made.append(row)
    return made


def save_model(folder: Path, seed: int) -> str:
    """An untrained model that answers differently from question to question."""
    model = build_family("llama")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.15)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="session")
def data_root(work: Path) -> str:
    (work / "data" / "tofu").mkdir(parents=True)
    for split in (*COUNTS, *HOLDOUT):
        write_rows(work / "data" / "tofu" / f"{split}.json", rows_of(split))
    write_rows(work / "data" / "tofu" / "forget05_perturbed.json", rows_of("forget01_perturbed"))
    write_rows(work / "data" / "tofu" / "holdout05.json", rows_of("holdout01"))
    return str(work / "data")


@pytest.fixture(scope="session")
def model_folder(work: Path) -> str:
    return save_model(work / "model", 0)


@pytest.fixture(scope="session")
def retain_folder(work: Path) -> str:
    return save_model(work / "retain", 1)


@pytest.fixture
def settings(model_folder: str, data_root: str, tmp_path: Path) -> dict[str, Any]:
    """What every run has; `out` is tmp_path/run."""
    return {
        "model": model_folder,
        "data_root": data_root,
        "forget": "forget01",
        "device": "cpu",
        "max_new_tokens": 12,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def evaluate(settings: dict[str, Any]) -> Callable[..., Path]:
    """`evaluate("name", **settings)` runs the command into tmp_path/name and gives the folder."""

    def ran(name: str, **changes: Any) -> Path:
        given = {**settings, "out": str(Path(settings["out"]).with_name(name)), **changes}
        run(from_mapping(EvaluateConfig, {key: value for key, value in given.items() if value is not None}))
        return Path(given["out"])

    return ran


def arguments(settings: dict[str, Any], **changes: Any) -> list[str]:
    given = {**settings, **changes}
    return [part for name, value in given.items() if value is not None for part in (flag_name(name), str(value))]


@pytest.fixture
def fails(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, expects one line on stderr and no run folder, gives the line."""

    def ran(**changes: Any) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main(arguments(settings, **changes)) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.startswith("fillm evaluate: ") and out == "", (out, err)
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("fillm evaluate: ")

    return ran
