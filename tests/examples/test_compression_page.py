"""What docs/compression.md shows of the study is what its committed rows say."""

from pathlib import Path

import pytest

from benchmarks.compression.page import bar_table, cost_table, read

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", [cost_table, bar_table])
def test_the_tables_are_those_of_the_rows(table):
    assert table(read()) in PAGE
