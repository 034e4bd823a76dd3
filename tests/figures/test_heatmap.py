import itertools
import math
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from fillm.errors import UsageError
from fillm.figures import heatmap, score_heatmap

TENSORS = {"self_attn.q_proj": "attn", "mlp.up_proj": "mlp", "input_layernorm": "norm"}


def model(layers):
    names = [f"model.layers.{layer}.{tensor}.weight" for layer in range(layers) for tensor in TENSORS]
    kinds = list(TENSORS.values()) * layers
    numbers = [layer for layer in range(layers) for _ in TENSORS]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return names, [*kinds, "embed", "norm", "lm_head"], [*numbers, -1, -1, -1]


def drawn(monkeypatch, names, kinds, layers, scores, path, **options):
    """The figure that was saved."""
    figures = []
    draw = heatmap._draw
    monkeypatch.setattr(heatmap, "_draw", lambda *args: figures.append(draw(*args)) or figures[-1])
    score_heatmap(names, kinds, layers, scores, path, **options)
    return figures[0]


def test_the_same_bytes_for_the_same_scores_whatever_the_persons_settings(tmp_path):
    names, kinds, layers = model(4)
    scores = [10.0 ** (i % 7 - 3) for i in range(len(names))]
    score_heatmap(names, kinds, layers, scores, tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 30.0, "figure.facecolor": "red", "savefig.bbox": "tight"}):
        score_heatmap(names, kinds, layers, scores, tmp_path / "two.png")
        assert matplotlib.rcParams["font.size"] == 30.0
    one = (tmp_path / "one.png").read_bytes()
    assert one == (tmp_path / "two.png").read_bytes()
    assert b"Software" not in one and b"tIME" not in one and b"Date" not in one


def test_the_order_of_the_rows_does_not_depend_on_the_ranking(tmp_path):
    names, kinds, layers = model(3)
    scores = [1.0 + i for i in range(len(names))]
    score_heatmap(names, kinds, layers, scores, tmp_path / "one.png")
    score_heatmap(names[::-1], kinds[::-1], layers[::-1], scores[::-1], tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_every_score_is_in_its_cell(monkeypatch, tmp_path):
    names, kinds, layers = model(4)
    scores = [float(i + 1) for i in range(len(names))]
    figure = drawn(
        monkeypatch, names, kinds, layers, scores, tmp_path / "a.png", title="soir", label="|u| (weight per nat)"
    )
    axes, bar = figure.axes
    rows = [text.get_text() for text in axes.get_yticklabels()]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    assert columns == ["–", "0", "1", "2", "3"]
    grid = axes.images[0].get_array()
    for name, layer, score in zip(names, layers, scores, strict=True):
        short = name.split(f".{layer}.")[-1] if layer >= 0 else ".".join(name.split(".")[-2:])
        assert grid[rows.index(short), layer + 1] == score
    assert grid.count() == len(names)
    assert bar.get_ylabel() == "|u| (weight per nat), log scale" and axes.get_title(loc="left") == "soir"
    kinds_shown = [text.get_text() for text in axes.texts]
    assert kinds_shown == ["mlp", "attn", "norm", "embed", "lm_head"]
    # In pixels: equal steps in the logarithm are equal steps on the scale.
    norm = axes.images[0].norm
    assert math.isclose(norm(10.0) - norm(1.0), (math.log(10.0) - math.log(1.0)) / math.log(max(scores)), rel_tol=1e-9)


def test_zero_and_infinity_have_colours_of_their_own(monkeypatch, tmp_path):
    names, kinds, layers = model(2)
    scores = [0.0, math.inf, *(float(i + 1) for i in range(len(names) - 2))]
    figure = drawn(monkeypatch, names, kinds, layers, scores, tmp_path / "a.png")
    axes = figure.axes[0]
    special = axes.images[1].get_array()
    assert special.count() == 2 and sorted(special.compressed()) == [0.0, 1.0]
    assert axes.images[0].get_array().count() == len(names) - 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["zero", "infinite", "no such tensor"]
    pixels = {tuple(p) for p in (imread(tmp_path / "a.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    for colour in (heatmap._ZERO, heatmap._INFINITE):
        rgb = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert rgb in pixels
        distance = np.abs(matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3] * 255 - rgb).sum(1).min()
        assert distance > 60


def test_negative_scores_take_a_symmetric_scale(monkeypatch, tmp_path):
    names, kinds, layers = model(2)
    scores = [(-1.0) ** i * 10.0**-i for i in range(len(names))]
    figure = drawn(monkeypatch, names, kinds, layers, scores, tmp_path / "a.png")
    assert figure.axes[1].get_ylabel() == "score, symmetric log scale"
    norm = figure.axes[0].images[0].norm
    assert norm(0.0) == pytest.approx(0.5) and (norm.vmin, norm.vmax) == (-1.0, 1.0)


def test_the_largest_of_several_is_shown(monkeypatch, tmp_path):
    names = [f"model.layers.0.mlp.experts.{i}.w1.weight" for i in range(3)] * 2
    figure = drawn(monkeypatch, names, ["expert"] * 6, [0] * 6, [1.0, 5.0, 2.0, 3.0, 4.0, 0.5], tmp_path / "a.png")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["mlp.experts.*.w1.weight"]
    assert axes.images[0].get_array().tolist() == [[5.0]]


def test_eighty_layers_stay_readable(monkeypatch, tmp_path):
    names, kinds, layers = model(80)
    figure = drawn(monkeypatch, names, kinds, layers, [1.0 + i for i in range(len(names))], tmp_path / "a.png")
    axes = figure.axes[0]
    figure.canvas.draw()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    width, height = figure.get_size_inches()
    assert width < 24 and height < 6
    left = min(label.get_window_extent().x0 for label in axes.get_yticklabels())
    assert left > max(text.get_window_extent().x1 for text in axes.texts) > 0


@pytest.mark.parametrize(
    ("layers", "scores"), [([-1, -1], [0.0, 0.0]), ([0, 1], [math.inf, math.inf]), ([0, 1], [2.0, 2.0])]
)
def test_degenerate_scores_are_drawn(tmp_path, layers, scores):
    names = [f"model.layers.{layer}.w.weight" if layer >= 0 else f"w{i}.weight" for i, layer in enumerate(layers)]
    score_heatmap(names, ["mlp", "mlp"], layers, scores, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_names_that_would_be_confused_are_kept_apart():
    names = ["encoder.block.0.q.weight", "decoder.block.0.q.weight", "a.wte.weight", "b.wte.weight", "c.wpe.weight"]
    assert heatmap.row_labels(names, [0, 0, -1, -1, -1]) == [
        "encoder.block.*.q.weight", "decoder.block.*.q.weight", "a.wte.weight", "b.wte.weight", "wpe.weight",
    ]  # fmt: skip


def test_nothing_to_draw_is_refused(tmp_path):
    for arguments in (([], [], [], []), (["a"], ["mlp"], [0], [1.0, 2.0])):
        with pytest.raises(UsageError, match="at least one of each"):
            score_heatmap(*arguments, tmp_path / "a.png")


def test_pyplot_and_its_state_stay_out(tmp_path):
    score_heatmap(["w.weight"], ["mlp"], [-1], [1.0], tmp_path / "a.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
