"""A saved model of a few thousand weights, its tokenizer, and two small data files, for whole runs of the command."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fillm.rank import ranking_files
from fillm.rank.__main__ import main
from tests.families import VOCAB_SIZE, build_family

WORDS = [f"w{number}" for number in range(80)]


def question_row(number: int, words: int = 4) -> dict[str, str]:
    """A row of its own: which words stand in it, and how many, depends on `number`."""
    picked = [WORDS[(number * 7 + 3 * position) % len(WORDS)] for position in range(2 * words)]
    return {"question": " ".join(picked[:words]), "answer": " ".join(picked[words:])}


def write_rows(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; 0 to 3 are the special ones, as in the configurations of `tests.families`."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    assert len(vocab) <= VOCAB_SIZE
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "llama"
    build_family("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def forget_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "forget.jsonl"
    return write_rows(path, [question_row(number, 2 + number % 3) for number in range(6)])


@pytest.fixture(scope="session")
def retain_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "retain.jsonl"
    return write_rows(path, [question_row(number, 2 + number % 5) for number in range(20, 34)])


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares runs that are about something else the picture, which takes longer than their passes."""
    monkeypatch.setattr(ranking_files, "score_heatmap", lambda *given, **options: None)


@pytest.fixture
def arguments(model_folder: str, forget_file: str, retain_file: str, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small run into `tmp_path/run`; `forget=...` and the like replace its options."""

    def build(*further: str, **changes: str | None) -> list[str]:
        options = {"model": model_folder, "forget": forget_file, "retain": retain_file}
        options |= {"out": str(tmp_path / "run"), "device": "cpu", "tokens_per_batch": "48"}
        given = {name: value for name, value in (options | changes).items() if value is not None}
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
        return [*(part for pair in pairs for part in pair), *further]

    return build


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Runs the command, expects one line on stderr and no run folder, and returns the line."""

    def run(argv: Sequence[str], code: int = 2, also: int = 0) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(argv) == code
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert len(lines) == 1 + also and lines[-1].startswith("fillm rank: ") and out == "", (out, err)
        assert sorted(tmp_path.rglob("*")) == before
        return lines[-1].removeprefix("fillm rank: ")

    return run
