"""The benchmark of several processes measures what it says: which rows there are, and that they say the same."""

import csv
from pathlib import Path

import pytest

from benchmarks.end_to_end import bench_processes as bench
from tests.rank.conftest import question_row, write_rows


@pytest.mark.slow
def test_a_row_for_every_variant_and_number_of_processes(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.csv"
    data = ["--forget", write_rows(tmp_path / "forget.jsonl", [question_row(n) for n in range(4)])]
    data += ["--retain", write_rows(tmp_path / "retain.jsonl", [question_row(n) for n in range(20, 30)])]
    monkeypatch.setattr(bench, "VARIANTS", {"certified": []})
    words = ["--model", str(small_model), *data, "--tokens-per-batch", "32", "--rounds", "1", "--out", str(out)]
    assert bench.main(words) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["processes"]) for row in rows] == [("certified", "1"), ("certified", "2")]
    assert all(float(rows[0][f"{what}_speedup"]) == 1.0 for what in bench.TIMES)
    one, two = (float(row["command_seconds"]) for row in rows)
    assert float(rows[1]["command_speedup"]) == pytest.approx(one / two)
    assert all(
        0 < float(row["passes_seconds"]) < float(row["ranking_seconds"]) < float(row["command_seconds"]) for row in rows
    )
    assert float(rows[1]["largest_difference"]) <= 1e-6
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
