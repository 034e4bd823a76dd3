import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fillm.report.page.overview import duration
from fillm.report.page.tables import Cell, column_cells, matrix_table, page_table
from fillm.report.page.texts import breakable


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1234567, None, -5], ["1,234,567", "–", "−5"]),
        ([0.5, 12.25, 0.0], ["0.5000", "12.2500", "0.0000"]),
        ([1.0, 2.0, 300.0], ["1", "2", "300"]),
        ([1e-7, 0.0, -2.5], ["1.000e-07", "0", "−2.500e+00"]),
        ([float("nan"), float("inf"), -math.inf], ["–", "∞", "−∞"]),
        ([None, None], ["–", "–"]),
        ([], []),
    ],
)
def test_numbers_of_a_column_share_a_format(values, texts):
    assert [cell.text for cell in column_cells(values, numeric=True)] == texts


@given(st.lists(st.one_of(st.none(), st.floats(), st.integers(-(2**60), 2**60).map(float)), max_size=8))
def test_a_cell_keeps_the_exact_number(values):
    for value, cell in zip(values, column_cells(values, numeric=True), strict=True):
        told = cell.text if cell.value is None else cell.value
        if value is None or math.isnan(value):
            assert told == ""
        else:
            assert float(told) == value and math.copysign(1, float(told)) == math.copysign(1, value)


def test_whole_numbers_are_kept_to_the_last_digit():
    big = 2**60 + 1
    assert column_cells([big, 7], numeric=True) == [Cell(f"{big:,}", str(big)), Cell("7")]


def test_texts_are_shown_as_they_are():
    cells = column_cells(["-a", None, True, [1, 2], ""], numeric=False)
    assert [cell.text for cell in cells] == ["-a", "", "yes", "[1, 2]", ""]


def test_the_columns_of_an_unknown_table_come_in_its_order_and_the_first_ones_first():
    table = pa.table({f"c{i}": [i, i + 1] for i in range(10)} | {"empty": pa.array([None, None], pa.int64())})
    found = page_table(table, "t", most=1, source="t.parquet")
    assert [column.name for column in found.columns] == [f"c{i}" for i in range(10)]
    assert [column.further for column in found.columns] == [False] * 8 + [True] * 2 and found.further == 2
    assert len(found.rows) == 1 and found.total == 2
    assert found.looks == ["number"] * 8 + ["number further"] * 2


def test_a_turned_table_has_its_rows_side_by_side_and_begins_anew_where_they_are_too_many():
    table = pa.table({"run": ["a", "b", "c"], "x": [1.0, 2.0, 3.0], "y": [0.5, None, 2.5]})
    first, second = page_table(table, "t", most=3).turned(2)
    assert [column.name for column in first.columns] == ["run", "a", "b"]
    assert [[cell.text for cell in row] for row in first.rows] == [["x", "1", "2"], ["y", "0.5000", "–"]]
    assert [column.name for column in second.columns] == ["run", "c"]
    assert [[cell.text for cell in row] for row in second.rows] == [["x", "3"], ["y", "2.5000"]]


@pytest.mark.parametrize(
    ("name", "html"),
    [
        ("rouge_l_recall", "rouge_<wbr>l_<wbr>recall"),
        ("layers.0.weight", "layers.<wbr>0.<wbr>weight"),
        ("loss", "loss"),
        ("ends_", "ends_"),
        ("<b>_&", "&lt;b&gt;_<wbr>&amp;"),
    ],
)
def test_a_name_may_be_broken_between_its_parts_and_is_no_markup(name, html):
    assert str(breakable(name)) == html


def test_an_empty_table_keeps_its_columns():
    found = page_table(pa.table({"a": pa.array([], pa.float64()), "b": pa.array([], pa.string())}), "t", most=5)
    assert [(column.name, column.numeric) for column in found.columns] == [("a", True), ("b", False)]
    assert found.rows == [] and found.total == 0


def test_a_matrix_has_its_names_in_front():
    found = matrix_table("m", "layer", ["x", "y"], ["r"], np.array([[0.25, np.nan]]))
    assert [[cell.text for cell in row] for row in found.rows] == [["r", "0.2500", "–"]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (61.4, "1 min 01 s"), (3599.6, "1 h 00 min"),
     (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations_never_show_sixty(seconds, text):
    assert duration(seconds) == text
