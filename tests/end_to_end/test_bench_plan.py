"""The benchmark of `--dry-run`: what it reads off a plan, and one small case from end to end."""

import csv
from pathlib import Path

import pytest

from benchmarks.end_to_end import bench_plan

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rank.md"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "plan_cpu.csv"


@pytest.mark.parametrize(("said", "size"), [("1,036.5 MiB", 1036.5 * 2**20), ("1.29 GiB", 1.29 * 2**30)])
def test_the_expected_peak_is_read_off_a_plan(said, size):
    assert bench_plan.expected_peak(f"memory\n  weights        3.0 MiB\n  expected peak  {said}\nwork\n") == size


def test_samples_differ_in_length_and_have_a_prompt():
    rows = [bench_plan.row_of(number) for number in range(bench_plan.RETAIN[1])]
    lengths = [len(row["input_ids"]) for row in rows]
    assert min(lengths) >= 100 and max(lengths) <= 200 and len(set(lengths)) > 10
    assert all(row["labels"][0] == -100 and row["labels"][-1] == row["input_ids"][-1] for row in rows)


def test_committed_plans_are_within_a_tenth():
    with RESULTS.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert {row["model"] for row in rows} == set(bench_plan.MODELS)
    assert {row["setting"] for row in rows} == set(bench_plan.SETTINGS)
    for row in rows:
        ratio = float(row["planned_bytes"]) / float(row["measured_bytes"])
        assert float(row["planned_over_measured"]) == pytest.approx(ratio)
        assert ratio == pytest.approx(1.0, abs=0.1), (row["model"], row["setting"])


def test_the_table_of_the_page_is_that_of_the_rows():
    with RESULTS.open(newline="", encoding="utf-8") as opened:
        assert bench_plan.table(list(csv.DictReader(opened))) in PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_small_case_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "plan.csv"
    given = ["--models", "Qwen3-MoE", "--settings", "recomputed", "sharded", "--tokens-per-batch", "256"]
    assert bench_plan.main([*given, "--out", str(out)]) == 0
    with out.open(newline="", encoding="utf-8") as opened:
        (row,) = csv.DictReader(opened)  # a mixture of experts is not sharded
    assert (row["model"], row["setting"], row["processes"]) == ("Qwen3-MoE", "recomputed", "1")
    assert 0.85 < float(row["planned_over_measured"]) < 1.15
    assert "Qwen3-MoE, recomputed: planned" in capsys.readouterr().out
