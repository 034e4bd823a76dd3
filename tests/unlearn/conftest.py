"""A saved model of a few thousand weights, two data files, a mask and a ranking, for whole runs of the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fillm
from fillm.config import from_mapping
from fillm.models import load_model
from fillm.rank import ranking_files
from fillm.rank.__main__ import main as rank
from fillm.unlearn.command import run
from fillm.unlearn.config import UnlearnConfig
from tests.families import build_family
from tests.rank.conftest import question_row, word_tokenizer, write_rows

SELECTED = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight")


def save_model(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> str:
    """A folder with an untrained model and its tokenizer."""
    build_family(family).to(dtype).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def mixed_mask(model: torch.nn.Module) -> fillm.Mask:
    """A whole tensor, some rows of one, and single weights of a vector."""
    parameters = dict(model.named_parameters())
    chosen = {name: torch.zeros(parameters[name].shape, dtype=torch.bool) for name in SELECTED}
    chosen[SELECTED[0]][:] = True
    chosen[SELECTED[1]][[1, 4, 30]] = True
    chosen[SELECTED[2]][[0, 7, 31]] = True
    return fillm.Mask.from_bool(chosen)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unlearn")


@pytest.fixture(scope="session")
def model_folder(work: Path) -> str:
    return save_model(work / "llama")


@pytest.fixture(scope="session")
def forget_file(work: Path) -> str:
    """Seven rows: no multiple of any batch size used here."""
    return write_rows(work / "forget.jsonl", [question_row(number, 2 + number % 3) for number in range(7)])


@pytest.fixture(scope="session")
def retain_file(work: Path) -> str:
    return write_rows(work / "retain.jsonl", [question_row(number, 2 + number % 5) for number in range(20, 31)])


@pytest.fixture(scope="session")
def mask_file(work: Path, model_folder: str) -> str:
    path = work / "mask.safetensors"
    mixed_mask(load_model(model_folder, device="cpu")).save(path)
    return str(path)


@pytest.fixture(scope="session")
def make_ranking(work: Path, model_folder: str, forget_file: str, retain_file: str) -> Callable[..., str]:
    """`make_ranking("name", *flags)` ranks the model once and gives the folder."""

    def made(name: str, *flags: str) -> str:
        out = work / name
        if not out.exists():
            drawn, ranking_files.score_heatmap = ranking_files.score_heatmap, lambda *given, **options: None
            try:
                given = ["--model", model_folder, "--device", "cpu", "--forget", forget_file, "--retain", retain_file]
                assert rank([*given, *flags, "--out", str(out)]) == 0
            finally:
                ranking_files.score_heatmap = drawn
        return str(out)

    return made


@pytest.fixture
def settings(model_folder: str, mask_file: str, forget_file: str, retain_file: str, tmp_path: Path) -> dict[str, Any]:
    """What every run has; `out` is tmp_path/run."""
    return {
        "model": model_folder,
        "mask": mask_file,
        "forget": forget_file,
        "retain": retain_file,
        "device": "cpu",
        "lr": 1e-2,
        "max_steps": 3,
        "batch_size": 4,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def unlearn(settings: dict[str, Any]) -> Callable[..., Path]:
    """`unlearn("name", **settings)` runs the command into tmp_path/name and gives the folder."""

    def ran(name: str, **changes: Any) -> Path:
        given = {**settings, "out": str(Path(settings["out"]).with_name(name)), **changes}
        given = {key: value for key, value in given.items() if value is not None}
        run(from_mapping(UnlearnConfig, given))
        return Path(given["out"])

    return ran
