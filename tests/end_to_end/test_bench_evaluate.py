"""The benchmark of the evaluation runs the whole command, compares with its own first run, and writes what it took."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.end_to_end import bench_evaluate as bench
from fillm.errors import UsageError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In the place of the command: a folder with two figures, a different second a run; the words of every run."""
    given: list[list[str]] = []

    def stand_in(name, words, out, threads, processes=1):
        given.append([name, *words, str(threads)])
        out.mkdir(exist_ok=True)
        summary = {"model_utility": 0.5, "forget_quality": None, "notes": {"forget_quality": "no reference"}}
        (out / "summary.json").write_text(json.dumps(summary))
        pq.write_table(pa.table({"row": [0, 1, 2]}), out / "rows.parquet")
        seconds = (99.0, 3.0, 1.0, 2.0)[len(given) - 1]
        record = {"seconds": seconds, "peak_memory_bytes": 7, "settings": {"max_new_tokens": 200}}
        return seconds + 0.5, record

    monkeypatch.setattr(bench, "timed_command", stand_in)
    return given


def test_the_warm_up_is_compared_with_and_not_counted(command, tmp_path: Path) -> None:
    row = bench.measured(["--forget", "x"], 3, 2, tmp_path)
    assert command[0] == ["evaluate", "--forget", "x", "2"]
    assert command[1:] == [["evaluate", "--forget", "x", "--reference", str(tmp_path / "reference"), "2"]] * 3
    assert [row[f"evaluation_seconds{end}"] for end in ("", "_min", "_max")] == [2.0, 1.0, 3.0]
    assert [row[f"command_seconds{end}"] for end in ("", "_min", "_max")] == [2.5, 1.5, 3.5]
    assert (row["rows"], row["figures"], row["missing"]) == (3, 1, "forget_quality")
    assert (row["rounds"], row["threads"], row["max_new_tokens"], row["peak_memory_bytes"]) == (3, 2, 200, 7)


def test_rounds_that_differ_are_no_measurement(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter(({"a": 1.0}, {"a": 1.0}, {"a": 2.0}))
    monkeypatch.setattr(bench, "_figures", lambda out: next(found))
    with pytest.raises(RuntimeError, match="round 3 came to other figures than the first"):
        bench.measured([], 3, 1, tmp_path)


def test_what_the_command_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    def refuses(*words, **others):
        raise UsageError("fillm evaluate: --forget forget01: no such split")

    monkeypatch.setattr(bench, "timed_command", refuses)
    with pytest.raises(SystemExit) as error:
        bench.main(["--model", str(tmp_path), "--out", str(tmp_path / "rows.csv")])
    assert error.value.code == 2 and not (tmp_path / "rows.csv").exists()
    assert capsys.readouterr().err == f"{bench.PROGRAM}: fillm evaluate: --forget forget01: no such split\n"


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--threads", "0"]])
def test_needs_a_round_and_a_thread(words: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(words)
    assert error.value.code == 2


@pytest.mark.slow
def test_a_quick_run_evaluates_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'kernels'}")
    monkeypatch.setenv("FILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FILLM_DATA", raising=False)
    out = tmp_path / "rows.csv"
    assert bench.main(["--quick", "--rounds", "1", "--threads", "1", "--out", str(out)]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["benchmark"], row["forget"], row["missing"]) == ("fictional-small", "forget05", "")
    assert int(row["figures"]) >= 25 and int(row["rows"]) > 109  # the general facts, and the rows of the sets
    assert 0.0 < float(row["evaluation_seconds"]) < float(row["command_seconds"])
    assert row["command"].endswith("--rounds 1 --threads 1 --quick") and str(tmp_path) not in out.read_text()
