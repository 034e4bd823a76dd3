import io
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from fillm.errors import UsageError
from fillm.report.drawing import draw
from fillm.report.drawing import draw as package
from fillm.report.drawing.draw import _figure, _settings
from fillm.report.drawing.panels import colour_range
from fillm.report.drawing.table import draw_table
from fillm.report.drawing.ticks import power, signed_decades
from fillm.report.figures import Axis, Column, FigureData, Level, Matrix, Panel, Series, Table
from fillm.report.theme import DARK, LIGHT, THEMES

NAN = float("nan")
SERIES = Series(
    "first <&> $1", np.array([1.0, NAN, 3.0]), np.array([10.0, NAN, 1000.0]), 1,
    y_low=np.array([5.0, NAN, NAN]), y_high=np.array([20.0, NAN, NAN]), line=True, dashed=True, hollow=True,
)  # fmt: skip
CURVES = FigureData(
    "curves", "Curves", "",
    (
        Panel("one", Axis("time", "s"), Axis("size", "bytes", "log"), (SERIES,), levels=(Level(50.0, "whole"),)),
        Panel("two", Axis("p", scale="log", reverse=True), Axis("mask", "", "category", ("a", "b"), True),
              (Series("second", np.array([0.5, NAN]), np.array([0.0, 1.0]), 9),)),
    ),
    columns=2,
)  # fmt: skip
CELLS = np.array([[1.0, 100.0, 0.0], [np.inf, NAN, 10.0]])
CATEGORIES = {"scale": "category", "categories": ("–", "0", "1")}
MAP = FigureData(
    "score_heatmap", "Map", "",
    (Panel("m", Axis("layer", **CATEGORIES), Axis("tensor", "", "category", ("q", "up"), True),
           matrix=Matrix(CELLS, Axis("score", "nat", "log"), groups=("attn", "mlp"))),),
)  # fmt: skip
SIGNED = FigureData(
    "rank_agreement", "Agreement", "",
    (Panel("m", Axis("a", "", "category", ("long name", "b")), Axis("a", "", "category", ("long name", "b"), True),
           matrix=Matrix(np.array([[1.0, -0.001], [-0.5, NAN]]), Axis("correlation"), -1.0, 1.0, numbers=True)),),
)  # fmt: skip
TABLE = Table((Column("run", numeric=False), Column("time", "s")), (("a", 1.5), ("b", None)), ("a: why",))
EMPTY = FigureData(
    "empty", "Empty", "",
    (Panel("nan", Axis("x", scale="log"), Axis("y", scale="log"), (Series("", np.array([NAN]), np.array([NAN])),)),
     Panel("bare", Axis("x"), Axis("y"))),
)  # fmt: skip
ALL = [CURVES, MAP, SIGNED, EMPTY, FigureData("table", "Table", "", table=TABLE)]


def figure_of(data, theme=LIGHT):
    with _settings(theme):
        return _figure(data, theme)


def drawn(data, kind, theme=LIGHT):
    file = io.BytesIO()
    draw(data, file, theme, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("data", ALL, ids=lambda data: data.name)
def test_the_same_bytes_whatever_a_persons_settings(data, kind):
    one = drawn(data, kind)
    with matplotlib.rc_context({"font.size": 30.0, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert drawn(data, kind) == one
        assert matplotlib.rcParams["font.size"] == 30.0
    assert b"Date" not in one and b"dc:date" not in one and b"Software" not in one


@pytest.mark.parametrize("theme", THEMES.values(), ids=lambda theme: theme.name)
def test_a_theme_is_the_ground_and_the_ink(theme):
    pixels = imread(io.BytesIO(drawn(CURVES, "png", theme)))
    assert to_hex(pixels[0, 0, :3]) == theme.ground
    text = drawn(CURVES, "svg", theme).decode()
    assert f"fill: {theme.ground}" in text and f"fill: {theme.ink}" in text and f"stroke: {theme.colour(1)}" in text


def test_an_svg_keeps_its_text_and_escapes_it():
    text = drawn(CURVES, "svg").decode()
    found = {node.text for node in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"Curves", "one", "two", "time (s)", "size (bytes)", "p", "mask", "first <&> $1", "second", "whole"} <= found
    assert "sans-serif" in text and "<script" not in text


def test_points_bars_lines_and_levels_are_where_the_data_say():
    axes = figure_of(CURVES).axes[0]
    (container,) = axes.containers
    line, caps, (bars,) = container
    np.testing.assert_array_equal(line.get_xydata(), np.stack([SERIES.x, SERIES.y], axis=1))
    np.testing.assert_array_equal(bars.get_segments()[0], [[1.0, 5.0], [1.0, 20.0]])
    assert (line.get_linestyle(), line.get_marker(), len(caps)) == ("--", LIGHT.marker(1), 2)
    assert (line.get_color(), line.get_markerfacecolor()) == (LIGHT.colour(1), LIGHT.ground)
    (level,) = [one for one in axes.lines if one.get_ydata()[0] == 50.0 and len(one.get_ydata()) == 2]
    assert level.get_linestyle() == "--"
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylabel()) == ("linear", "log", "size (bytes)")


def test_axes_are_named_turned_and_scaled():
    axes = figure_of(CURVES).axes[1]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert axes.yaxis_inverted() and axes.xaxis_inverted() and axes.get_xscale() == "log"


def test_steps_are_whole_and_a_long_line_has_few_markers():
    line = Series("loss", np.arange(400.0), np.arange(400.0), line=True)
    few = Panel("few", Axis("step", whole=True), Axis("y"), (Series("loss", np.array([1.0, 2.0, 3.0]), np.ones(3)),))
    figure = figure_of(FigureData("f", "F", "", (few, Panel("many", Axis("step", whole=True), Axis("y"), (line,))), 2))
    assert all(float(tick).is_integer() for axes in figure.axes for tick in axes.get_xticks())
    assert [axes.containers[0][0].get_markevery() for axes in figure.axes] == [1, 10]


def test_a_long_title_of_a_panel_is_broken_inside_the_picture():
    series = Series("one", np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    words = "Model Utility against probability of the forget set's answers, npo, top:0.1, ranking soir, 2 runs"
    figure = figure_of(FigureData("f", "F", "c", (Panel(words, Axis("x"), Axis("y"), (series,)),)))
    (title,) = [text for text in figure.axes[0].findobj(Text) if text.get_text().startswith("Model")]
    assert title.get_text().split() == words.split()
    figure.draw_without_rendering()
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_the_legend_names_every_series_and_level_once():
    (legend,) = figure_of(CURVES).legends
    assert [text.get_text() for text in legend.get_texts()] == ["first <&> $1", "second", "whole"]
    marker = legend.legend_handles[0]
    assert marker.get_marker() == LIGHT.marker(1) and marker.get_color() == LIGHT.colour(1)


def test_cells_have_the_colours_of_their_values():
    figure = figure_of(MAP, DARK)
    axes, bar = figure.axes
    scored, special = axes.collections
    np.testing.assert_array_equal(np.ma.filled(scored.get_array(), NAN), [[1.0, 100.0, NAN], [NAN, NAN, 10.0]])
    np.testing.assert_array_equal(np.ma.filled(special.get_array(), NAN), [[NAN, NAN, 0.0], [1.0, NAN, NAN]])
    assert [to_hex(colour) for colour in special.get_cmap().colors] == [DARK.zero, DARK.infinite]
    assert (scored.norm.vmin, scored.norm.vmax) == (1.0, 100.0)
    assert bar.get_ylabel() == "score (nat)\nlog scale"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["attn  |  q", "mlp  |  up"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["zero", "infinite", "no such tensor"]


def test_numbers_stand_in_their_cells_and_can_be_read():
    axes = figure_of(SIGNED).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.00", "−0.50", "–"]
    assert axes.texts[0].get_color() == "#000000" and axes.texts[2].get_color() == "#ffffff"


@pytest.mark.parametrize(
    ("values", "scale", "expected"),
    [
        ([1.0, 100.0], "log", (1.0, 100.0)),
        ([0.0, np.inf, 4.0, NAN], "log", (4.0 / 3.0, 12.0)),
        ([-8.0, 2.0, 0.0], "symlog", (2.0, 8.0)),
        ([0.0, 0.0], "log", (1.0 / 3.0, 3.0)),
        ([5.0, 5.0], "linear", (4.0, 6.0)),
        ([-2.0, -1.0], "linear", (-2.0, -1.0)),
    ],
)
def test_the_colour_scale_spans_what_it_can_show(values, scale, expected):
    assert colour_range(Matrix(np.array([values]), Axis("score", scale=scale))) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.0], [NAN], [np.inf], [3.0], [-1.0, 1e-9, 0.0], [-2.0]])
@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_odd_matrices_are_drawn(values, scale):
    if scale == "log" and min(values) < 0:
        scale = "symlog"
    panel = Panel("m", Axis("x", scale="category", categories=("0",) * len(values)), Axis("y", "", "category", ("r",)),
                  matrix=Matrix(np.array([values]), Axis("score", scale=scale)))  # fmt: skip
    assert drawn(FigureData("m", "M", "", (panel,)), "png").startswith(b"\x89PNG")


def test_a_row_ends_where_a_panel_asks_for_a_new_one():
    panels = [Panel(str(i), Axis("x"), Axis("y"), new_row=i == 1) for i in range(4)]
    figure = figure_of(FigureData("f", "F", "", tuple(panels), columns=2))
    places = {axes.get_title(loc="left"): axes.get_subplotspec() for axes in figure.axes if axes.axison}
    assert [(p.rowspan.start, p.colspan.start) for p in places.values()] == [(0, 0), (1, 0), (1, 1), (2, 0)]


def test_wide_panels_stand_below_one_another():
    names = tuple(f"a name that takes room, number {i}" for i in range(40))
    wide = Panel("w", Axis("x", "", "category", names), Axis("y", "", "category", names[:3]),
                 matrix=Matrix(np.ones((3, 40)), Axis("s")))  # fmt: skip
    figure = figure_of(FigureData("f", "F", "", (wide, wide), columns=2))
    assert {axes.get_subplotspec().colspan.start for axes in figure.axes if axes.get_title(loc="left")} == {0}


def test_a_table_shows_numbers_to_the_right_and_dashes_for_nothing():
    with _settings(LIGHT):
        figure = draw_table("Table", TABLE, LIGHT)
    texts = {text.get_text(): text.get_ha() for text in figure.axes[0].texts}
    assert texts == {"Table": "left", "run": "left", "time (s)": "right", "a": "left", "1.500": "right", "b": "left",
                     "–": "right", "a: why": "left"}  # fmt: skip


def test_a_wide_table_is_turned():
    columns = (Column("run", numeric=False), *(Column(f"m{i}") for i in range(9)))
    table = Table(columns, (("a", *map(float, range(9))), ("b", *[None] * 9)))
    with _settings(LIGHT):
        figure = draw_table("T", table, LIGHT)
    heights = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert heights["run"] == heights["a"] == heights["b"] < heights["m0"] == heights["0.000"] < heights["m8"]


def test_ticks_are_powers_without_markup():
    shown = {0.0: "0", 1e-3: "10⁻³", 1.5e6: "1.5·10⁶", -1e5: "−10⁵", -0.5: "−0.5", 1000.0: "1000", 0.048: "0.048"}
    assert {value: power(value) for value in shown} == shown
    assert signed_decades(0.9, 250.0) == [-100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 100.0]
    assert len(signed_decades(1e-8, 1e8)) <= 9


def test_letters_that_the_font_lacks_are_no_error():
    assert drawn(FigureData("t", "日本 🙂", "", table=TABLE), "png").startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a picture is .png or .svg"):
        draw(CURVES, tmp_path / "a.pdf", LIGHT)
    with pytest.raises(UsageError, match="needs panels or a table"):
        draw(FigureData("f", "F", ""), tmp_path / "a.png", LIGHT)
    assert package is draw and not list(tmp_path.iterdir())
