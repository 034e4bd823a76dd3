"""What the benchmarks that run whole commands need."""

from pathlib import Path

import pytest

from tests.families import build_family
from tests.rank.conftest import word_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a small Llama with its tokenizer, for commands that find this checkout's packages."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    model = tmp_path / "llama"
    build_family("llama").save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    return model
