"""What plotly is given, against values worked out by hand; plotly's Python package checks that it would take them."""

import json
import math

import numpy as np
import plotly.graph_objects
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fillm.report.figures.data import Axis, Level, Matrix, Panel, Series
from fillm.report.page.looks import glyph, looks
from fillm.report.page.plots import panel_plot
from fillm.report.page.scales import Placing
from tests.report.page_example import HOSTILE, example_figures

LINEAR = Axis("x", "s")


def test_plotly_takes_every_panel_and_both_looks():
    for figure in example_figures():
        for panel in figure.panels:
            plot = panel_plot(panel)
            for look in looks().values():
                layout = {**plot["layout"], "template": look["template"]}
                plotly.graph_objects.Figure(data=plot["traces"], layout=layout)
            json.dumps(plot, allow_nan=False)


def test_error_bars_are_lengths_and_what_is_missing_is_null():
    series = Series(
        "s", np.array([1.0, 2.0, np.nan]), np.array([10.0, 0.0, 5.0]), 3,
        y_low=np.array([8.0, 0.0, np.nan]), y_high=np.array([13.0, np.inf, 6.0]), hollow=True,
    )  # fmt: skip
    [trace] = panel_plot(Panel("", LINEAR, Axis("y"), (series,)))["traces"]
    assert trace["x"] == [1.0, 2.0, None] and trace["y"] == [10.0, 0.0, 5.0]
    assert trace["error_y"]["array"] == [3.0, 0.0, 1.0] and trace["error_y"]["arrayminus"] == [2.0, 0.0, 0.0]
    assert "error_x" not in trace and trace["meta"] == {"style": 3, "hollow": True, "name": "s"}
    assert trace["hovertext"][0] == "<b>s</b><br>x: 1.000 s<br>y: 10.00 [8.000, 13.00]"


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show():
    x = np.array([1.0, 10.0, 0.0, -1.0])
    low = np.array([0.5, -3.0, 0.0, -2.0])
    panel = Panel("", Axis("n", "bytes", "log"), LINEAR, (Series("s", x, x, x_low=low, x_high=x),), levels=(
        Level(0.0, "none", along="y"), Level(100.0, "some", along="y"), Level(3.0, "flat"),
    ))  # fmt: skip
    plot = panel_plot(panel)
    [trace] = plot["traces"]
    assert trace["x"] == [1.0, 10.0, None, None] and trace["y"] == [1.0, 10.0, 0.0, -1.0]
    assert trace["error_x"]["arrayminus"] == [0.5, 0.0, 0.0, 0.0]
    assert plot["layout"]["xaxis"]["type"] == "log" and plot["layout"]["xaxis"]["title"]["text"] == "n (bytes)"
    upright, flat = plot["layout"]["shapes"]
    assert (upright["x0"], upright["x1"], upright["yref"]) == (100.0, 100.0, "paper")
    assert (flat["y0"], flat["y1"], flat["xref"]) == (3.0, 3.0, "paper")
    assert [note["text"] for note in plot["layout"]["annotations"]] == ["some", "flat"]
    assert plot["layout"]["annotations"][0]["x"] == 2.0  # log10(100): annotations are placed by it, shapes are not


def test_categories_keep_their_order_and_their_side():
    names = ("first", "a" * 40)
    panel = Panel("", LINEAR, Axis("name", scale="category", categories=names, reverse=True),
                  (Series("s", np.array([3.0, 4.0]), np.array([0.0, 1.0])),))  # fmt: skip
    plot = panel_plot(panel)
    axis = plot["layout"]["yaxis"]
    assert axis["tickvals"] == [0, 1] and axis["range"] == [1.5, -0.5]
    assert axis["ticktext"] == ["first", "a" * 16 + "…" + "a" * 16]
    assert plot["traces"][0]["hovertext"][1] == f"<b>s</b><br>x: 4.000 s<br>name: {'a' * 40}"


def test_many_points_are_sent_without_a_sentence_each():
    x = np.arange(600.0)
    [trace] = panel_plot(Panel("", Axis("step", whole=True), LINEAR, (Series("s", x, x, line=True),)))["traces"]
    assert "hovertext" not in trace and trace["marker"]["maxdisplayed"] == 40


def test_a_panel_without_a_point_says_so():
    nothing = Series("s", np.array([np.nan]), np.array([1.0]))
    assert panel_plot(Panel("", LINEAR, LINEAR, (nothing,)))["layout"]["annotations"][0]["text"] == "nothing to show"
    assert panel_plot(Panel("", LINEAR, LINEAR))["traces"] == []


def matrix_panel(values, colour, **how):
    rows, columns = values.shape
    across = Axis("layer", scale="category", categories=tuple(str(i) for i in range(columns)))
    down = Axis("tensor", scale="category", categories=tuple(f"t{i}.weight" for i in range(rows)), reverse=True)
    return Panel("", across, down, matrix=Matrix(values, colour, **how))


def test_zeros_and_infinite_cells_get_traces_of_their_own():
    values = np.array([[1e-3, 0.0, np.nan], [np.inf, 10.0, 1.0]])
    plot = panel_plot(matrix_panel(values, Axis("score", "nat", "log"), groups=("mlp", "attn")))
    cells, zero, infinite = plot["traces"]
    assert cells["z"] == [[-3.0, None, None], [None, 1.0, 0.0]]
    assert (cells["zmin"], cells["zmax"]) == (-3.0, 1.0)
    assert cells["colorbar"]["tickvals"] == [-3.0, -2.0, -1.0, 0.0, 1.0]
    assert cells["colorbar"]["ticktext"] == ["10⁻³", "10⁻²", "10⁻¹", "1", "10"]
    assert zero["z"] == [[None, 1.0, None], [None, None, None]] and zero["meta"] == {"special": "zero"}
    assert infinite["z"] == [[None, None, None], [1.0, None, None]] and infinite["meta"] == {"special": "infinite"}
    assert infinite["hovertext"][1][0] == "<b>tensor: t1.weight</b><br>layer: 0<br>score: ∞ nat"
    assert plot["layout"]["yaxis"]["ticktext"] == ["<b>mlp</b>  t0.weight", "<b>attn</b>  t1.weight"]
    assert plot["layout"]["meta"]["short"] == ["t0", "t1"]
    assert [shape["y0"] for shape in plot["layout"]["shapes"]] == [0.5]


def test_numbers_are_written_in_a_colour_that_can_be_read():
    values = np.array([[1.0, -0.999, np.nan]])
    matrix = matrix_panel(values, Axis("correlation"), low=-1.0, high=1.0, numbers=True)
    cells, written = panel_plot(matrix)["traces"]
    assert written["text"] == ["1.00", "−1.00", "–"] and (written["x"], written["y"]) == ([0, 1, 2], [0, 0, 0])
    assert written["textfont"]["color"] == ["#000000", "#ffffff", "#808080"]
    assert cells["meta"] == {"signed": True} and (cells["zmin"], cells["zmax"]) == (-1.0, 1.0)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 2.0])
@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_a_single_cell_of_anything_has_a_colour_scale(value, scale):
    plot = panel_plot(matrix_panel(np.array([[value]]), Axis("score", scale=scale)))
    assert plot["traces"][0]["zmin"] < plot["traces"][0]["zmax"]
    json.dumps(plot, allow_nan=False)


def test_symmetric_logarithmic_places_by_hand():
    placing = Placing.of("symlog", np.array([0.0, 0.01, -1.0, np.inf]))
    assert placing.threshold == 0.01
    values = np.array([0.0, 0.01, 0.005, -0.01, 1.0, -100.0, np.nan, np.inf])
    assert placing.places(values).tolist()[:6] == [0.0, 1.0, 0.5, -1.0, 3.0, -5.0]
    assert np.isnan(placing.places(values)[6:]).all()
    places, texts = placing.ticks(-1.0, 0.1)
    assert texts == ["−1", "−10⁻¹", "−10⁻²", "0", "10⁻²", "10⁻¹"] and places == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]


@given(st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=2, max_size=20))
def test_symmetric_logarithmic_places_keep_the_order_and_the_sign(values):
    array = np.array(values)
    places = Placing.of("symlog", array).places(array)
    assert np.array_equal(np.sign(places), np.sign(array))
    order = np.argsort(array, kind="stable")
    assert (np.diff(places[order]) >= 0.0).all()


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.9, 1100.0, ["1", "10", "10²", "10³"]),
        (2e-6, 4e-4, ["3·10⁻⁶", "10⁻⁵", "3·10⁻⁵", "10⁻⁴", "3·10⁻⁴"]),
        (0.01, 0.9, ["0.01", "0.03", "0.1", "0.3"]),
        (1.2, 6.0, ["1.5", "2", "3", "4", "5", "6"]),
        (1.1, 1.3, ["1.1", "1.2", "1.3"]),
        (7.0, 7.0, ["7"]),
    ],
)
def test_logarithmic_ticks_are_round_where_they_can_be(low, high, texts):
    assert Placing("log").ticks(low, high)[1] == texts


@given(st.floats(1e-30, 1e30), st.floats(1.0, 1e12))
def test_logarithmic_ticks_lie_in_the_range_and_say_where(low, span):
    places, texts = Placing("log").ticks(low, low * span)
    assert 1 <= len(places) == len(texts) <= 7
    assert all(math.log10(low) - 1e-6 <= place <= math.log10(low * span) + 1e-6 for place in places)


def test_names_are_no_markup_for_plotly():
    series = Series(HOSTILE, np.array([1.0]), np.array([1.0]), labels=("a & b <i>",))
    [trace] = panel_plot(Panel(HOSTILE, Axis(HOSTILE), LINEAR, (series,), levels=(Level(1.0, HOSTILE),)))["traces"]
    assert trace["name"].startswith("&lt;/script&gt;&lt;img")
    assert "a &amp; b &lt;i&gt;" in trace["hovertext"][0] and "<img" not in json.dumps(trace["hovertext"])


def test_the_legend_draws_what_the_plot_draws():
    x = np.array([1.0])
    assert 'fill="none"><circle' in glyph(Series("a", x, x, 0, hollow=True))
    dashed = glyph(Series("a", x, x, 1, line=True, dashed=True))
    assert "stroke-dasharray" in dashed and 'fill="var(--mark)"><path' in dashed
