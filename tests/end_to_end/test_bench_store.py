"""The benchmark of the store measures what it says: a first ranking, and another forget set without a retain pass."""

import csv
from pathlib import Path

import pytest

from benchmarks.end_to_end import bench_store as bench
from tests.end_to_end.conftest import ROOT
from tests.rank.conftest import question_row, write_rows


@pytest.mark.slow
def test_a_row_for_every_kind(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    words = [
        "--model",
        str(small_model),
        "--compression",
        "countsketch",
        "oporp",
        "--sketch-dim",
        "64",
        "--rounds",
        "2",
    ]
    for name, numbers in (("forget", range(4)), ("other", range(4, 8)), ("retain", range(20, 40))):
        rows = [question_row(number) for number in numbers]
        words += [f"--{name}", write_rows(tmp_path / f"{name}.jsonl", rows)]
    assert bench.main([*words, "--out", str(out)]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["compression"] for row in rows] == ["countsketch", "oporp"]
    assert rows[0]["command"].endswith("--compression countsketch oporp --sketch-dim 64 --rounds 2")
    for row in rows:
        for what in bench.TIMES:
            least = float(row[f"{what}_second_seconds_min"]) / float(row[f"{what}_first_seconds_max"])
            most = float(row[f"{what}_second_seconds_max"]) / float(row[f"{what}_first_seconds_min"])
            assert least <= float(row[f"{what}_ratio_min"]) <= float(row[f"{what}_ratio_max"]) <= most
        assert float(row["ranking_second_seconds"]) < float(row["command_second_seconds"])
        assert int(row["store_bytes"]) > 20 * 64 * 4
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_what_the_command_refuses_is_one_line(small_model: Path, tmp_path: Path, capsys) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [question_row(number) for number in range(4)])
    words = ["--model", str(small_model), "--forget", rows, "--retain", rows, "--other", rows]
    with pytest.raises(SystemExit) as error:
        bench.main([*words, "--compression", "nosuch", "--out", str(tmp_path / "rows.csv")])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "--compression: 'nosuch'" in said and said.count("\n") == 1
    assert not (tmp_path / "rows.csv").exists()


def test_needs_a_round() -> None:
    with pytest.raises(SystemExit) as error:
        bench.main(["--rounds", "0"])
    assert error.value.code == 2


def test_the_page_shows_the_committed_row() -> None:
    with (ROOT / "benchmarks/results/rank_store_cpu.csv").open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    first, second = (float(row[f"ranking_{which}_seconds"]) for which in ("first", "second"))
    page = " ".join((ROOT / "docs/store.md").read_text(encoding="utf-8").split())
    assert f"took {first:.1f} s" in page
    assert f"from its store {second:.1f} s, {float(row['ranking_ratio']):.1%}".replace("%", " %") in page
