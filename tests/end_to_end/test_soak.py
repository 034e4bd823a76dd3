"""The soak runs every ranking in one process, and tells what grows from what comes and goes."""

import csv
from pathlib import Path

import pytest

from benchmarks.end_to_end import soak
from benchmarks.end_to_end.results import Row

MIB = 2**20


def rows_of(memory: list[float], descriptors: list[int] | None = None) -> list[Row]:
    """A loop every 10 s with so many MiB and descriptors."""
    counts = descriptors or [9] * len(memory)
    kinds = [turn[0] for turn in soak.TURNS]
    return [
        {"ranking": kinds[i % 6], "seconds": 10.0 * i, "resident_bytes": m * MIB, "anonymous_bytes": m * MIB,
         "descriptors": d, "threads": 1, "files": 18}
        for i, (m, d) in enumerate(zip(memory, counts, strict=True))
    ]  # fmt: skip


def test_a_loop_that_comes_and_goes_is_no_growth() -> None:
    rows = rows_of([500.0 + 20 * (i % 6) for i in range(60)], [9 + (i % 6 == 3) for i in range(60)])
    assert soak.what_grows(rows) == {}


def test_memory_that_rises_is_growth_of_as_much() -> None:
    rows = rows_of([500.0 + 20 * (i % 6) + 1.5 * i for i in range(60)])
    grown = soak.what_grows(rows)
    assert set(grown) == {"resident_bytes", "anonymous_bytes"}
    assert grown["resident_bytes"] == pytest.approx(29 * 1.5 * MIB, rel=0.1)  # kinds have their medians at other loops


def test_what_grew_in_the_first_half_alone_is_no_growth() -> None:
    assert soak.what_grows(rows_of([300.0 + 5 * min(i, 25) for i in range(60)])) == {}


def test_one_descriptor_more_is_growth() -> None:
    assert soak.what_grows(rows_of([500.0] * 60, [9] * 50 + [10] * 10)) == {"descriptors": 1.0}


def test_held_counts_what_this_process_opens(tmp_path: Path) -> None:
    before = soak.held(tmp_path)
    with (tmp_path / "one").open("w"), (tmp_path / "two").open("w"):
        during = soak.held(tmp_path)
    assert during["descriptors"] == before["descriptors"] + 2 and during["files"] == 2
    assert soak.held(tmp_path)["descriptors"] == before["descriptors"]
    assert 0 < before["anonymous_bytes"] <= before["resident_bytes"]


@pytest.mark.slow
def test_every_ranking_takes_its_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.csv"
    code = soak.main(["--minutes", "0", "--out", str(out)])
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ranking"] for row in rows] == [turn[0] for turn in soak.TURNS]
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "grown over the second half of the time" in capsys.readouterr().out
    assert code in (0, 1)  # a minute says nothing of growth


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 2:\nfillm rank: .*no such"):
        soak.loop(0, str(tmp_path / "none"), tmp_path)


def test_minutes_below_zero_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        soak.main(["--minutes", "-1"])
    assert error.value.code == 2 and "--minutes: give 0 or more" in capsys.readouterr().err
