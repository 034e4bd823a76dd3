import json
import math
from pathlib import Path
from statistics import correlation, mean, stdev

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fillm.evaluate.reference import ITSELF, LOG_ITSELF
from fillm.report.drawing import draw
from fillm.report.figures import figures_of, number
from fillm.report.figures.compression_curves import compression_curves, compression_workloads
from fillm.report.figures.frontier import frontier
from fillm.report.figures.metric_table import metric_table
from fillm.report.figures.rank_agreement import rank_agreement, spearman
from fillm.report.figures.score_heatmap import score_heatmap
from fillm.report.figures.training_curves import training_curves
from fillm.report.runs import load_runs
from fillm.report.theme import LIGHT
from tests.report import run_folders


def by_hand(x, y):
    """Spearman's rank correlation; a rank is what is smaller, and half of what is equal."""

    def ranks(values):
        return [sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values]

    return correlation(ranks(x), ranks(y))


def test_every_score_stands_in_its_cell(tmp_path):
    # attn.q and mlp.up of layers 0 and 1, then the embedding.
    data = score_heatmap(load_runs([run_folders.rank(tmp_path / "r", [1.0, 2.0, 3.0, 4.0, 5.0])]))
    (panel,) = data.panels
    assert panel.title == "soir" and data.columns == 1
    assert panel.x.categories == ("–", "0", "1") and panel.x.label == "layer"
    assert panel.y.categories == ("mlp.up.weight", "attn.q.weight", "wte.weight")
    assert panel.matrix.groups == ("mlp", "attn", "embed")
    expected = [[math.nan, 2.0, 4.0], [math.nan, 1.0, 3.0], [5.0, math.nan, math.nan]]
    np.testing.assert_array_equal(panel.matrix.values, expected)
    assert panel.matrix.colour.text == "score |u| (weight per nat)" and panel.matrix.colour.scale == "log"


def test_scores_below_zero_have_a_scale_with_both_signs(tmp_path):
    run = run_folders.rank(tmp_path / "r", [-1.0, 2.0, 3.0], objective="trade-off")
    (panel,) = score_heatmap(load_runs([run])).panels
    assert panel.matrix.colour.scale == "symlog" and panel.matrix.colour.text == "predicted retain change (nat)"


def test_labels_say_what_differs_from_the_defaults(tmp_path):
    folders = [
        run_folders.rank(tmp_path / "a", [1.0, 2.0, 3.0], damping=0.1),
        run_folders.rank(tmp_path / "b", [1.0, 2.0, 3.0], damping=0.5, out="x"),
        run_folders.rank(tmp_path / "c", [1.0, 2.0, 3.0], damping=0.1, method="random"),
        run_folders.rank(tmp_path / "d", [1.0, 2.0, 3.0], damping=0.1, objective="retain"),
        run_folders.rank(tmp_path / "e", [1.0, 2.0, 3.0], damping=0.1, out="y"),
    ]
    titles = [panel.title for panel in score_heatmap(load_runs(folders)).panels]
    assert titles == ["soir (a)", "soir, damping 0.5", "random", "soir, objective retain", "soir (e)"]


def test_agreement_is_spearmans_of_runs_of_one_model(tmp_path):
    scores = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [5.0, 4.0, 3.0, 2.0, 1.0], "c": [2.0, 1.0, 3.0, 4.0, 4.0]}
    folders = [run_folders.rank(tmp_path / name, some, seed=i) for i, (name, some) in enumerate(scores.items())]
    folders.append(run_folders.rank(tmp_path / "other", [1.0, 2.0, 3.0], model="another"))
    (panel,) = rank_agreement(load_runs(folders)).panels
    found = panel.matrix.values
    assert panel.title == "m, by tensor" and found.shape == (3, 3)
    expected = [[by_hand(one, other) for other in scores.values()] for one in scores.values()]
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert found[0, 1] == -1.0 and panel.matrix.low == -1.0 and panel.matrix.numbers
    assert panel.y.reverse and panel.x.categories == panel.y.categories


def test_agreement_counts_what_both_rank_whatever_their_order(tmp_path):
    one = run_folders.rank(tmp_path / "a", [1.0, 2.0, 3.0, 4.0, 9.0])
    two = run_folders.rank(tmp_path / "b", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0], seed=1)
    (panel,) = rank_agreement(load_runs([one, two])).panels
    assert panel.matrix.values[0, 1] == pytest.approx(by_hand([1, 2, 3, 4, 9], [1, 2, 3, 4, 0]))


def test_rows_of_one_tensor_are_told_apart_by_their_index(tmp_path):
    folders = []
    for name, scores, index in (("a", [3.0, 2.0, 1.0, 0.5], [0, 1, 2, 3]), ("b", [1.0, 2.0, 3.0, 9.0], [2, 0, 1, 3])):
        folder = run_folders.rank(tmp_path / name, [1.0] * 3, granularity="row", seed=len(folders))
        columns = {"name": ["w"] * 4, "kind": ["mlp"] * 4, "layer": [0] * 4, "index": index, "score": scores}
        pq.write_table(pa.table(columns), folder / "ranking.parquet")
        folders.append(folder)
    runs = load_runs(folders)
    (panel,) = rank_agreement(runs).panels
    assert panel.title == "m, by row"
    assert panel.matrix.values[0, 1] == pytest.approx(by_hand([3.0, 2.0, 1.0, 0.5], [2.0, 3.0, 1.0, 9.0]))
    np.testing.assert_array_equal([panel.matrix.values for panel in score_heatmap(runs).panels], [[[3.0]], [[9.0]]])


def test_agreement_without_an_order_is_not_a_number(tmp_path):
    one = run_folders.rank(tmp_path / "a", [1.0, 2.0, 3.0])
    two = run_folders.rank(tmp_path / "b", [2.0, 2.0, 2.0], method="none")
    (panel,) = rank_agreement(load_runs([one, two])).panels
    np.testing.assert_array_equal(panel.matrix.values, [[1.0, math.nan], [math.nan, math.nan]])


@given(st.lists(st.tuples(*[st.integers(0, 5) | st.just(math.inf)] * 2), min_size=3, max_size=30))
def test_spearman_is_pearsons_correlation_of_counted_ranks(pairs):
    x, y = (np.array(values, dtype=np.float64) for values in zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(by_hand(x, y), abs=1e-12)


def test_an_unlearning_is_a_line_from_before_to_what_was_kept(tmp_path):
    path = [(0, 1.0, 0.5), (1, None, None), (2, 2.0, 0.6), (3, 3.0, 0.8)]
    run = run_folders.unlearn(tmp_path / "u", path, (2.0, 0.6), kept_step=2)
    (panel,) = frontier(load_runs([run])).panels
    (series,) = panel.series
    np.testing.assert_array_equal([series.x, series.y], [[1.0, 2.0], [0.5, 0.6]])
    assert series.name == "npo, top:0.1" and series.x_low is None and series.line
    assert panel.x.text == "loss on the forget set (nats a token)"
    assert panel.y.text == "loss on the retain set (nats a token)" and panel.y.scale == "linear"


def test_repeats_are_a_mean_with_a_standard_deviation(tmp_path):
    ends = [(2.0, 0.6), (2.5, 0.7), (3.5, 0.5)]
    starts = [(0, 1.0, 0.5), (0, 1.5, 0.25), (0, 2.0, 0.75)]
    folders = [
        run_folders.unlearn(tmp_path / f"u{i}", [start, (1, 9.0, 9.0), (2, *end)], end, seed=i, model=f"models/{i}")
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    folders.append(run_folders.unlearn(tmp_path / "v", [(0, 1.0, 1.0), (1, 1.0, 1.0)], (1.0, 1.0), lr=0.5))
    data = frontier(load_runs(folders))
    several, alone = data.panels[0].series
    assert several.name == "npo, top:0.1, lr 0.001, 3 runs" and alone.name == "npo, top:0.1, lr 0.5"
    for axis in (0, 1):
        values, low, high = [
            (several.x, several.x_low, several.x_high),
            (several.y, several.y_low, several.y_high),
        ][axis]
        told = [end[axis] for end in ends]
        np.testing.assert_allclose(values, [mean(s[axis + 1] for s in starts), 9.0, mean(told)], rtol=1e-14)
        np.testing.assert_allclose([low[-1], high[-1]], [mean(told) - stdev(told), mean(told) + stdev(told)])
        assert np.isnan(low[:-1]).all() and np.isnan(high[:-1]).all()
    assert "one standard deviation" in data.caption


def test_the_same_seed_twice_is_no_repeat(tmp_path):
    folders = [run_folders.unlearn(tmp_path / n, [(0, 1.0, 1.0), (1, 2.0, 1.0)], (2.0, 1.0)) for n in "ab"]
    data = frontier(load_runs(folders))
    assert [series.name for series in data.panels[0].series] == ["npo, top:0.1 (a)", "npo, top:0.1 (b)"]
    assert "standard deviation" not in data.caption


def test_rankings_made_alike_are_one_recipe(tmp_path):
    rankings = [run_folders.rank(tmp_path / f"r{i}", [1.0, 2.0, 3.0], objective="retain") for i in range(2)]
    rankings.append(run_folders.rank(tmp_path / "r2", [1.0, 2.0, 3.0], method="random"))
    rankings.append(run_folders.rank(tmp_path / "r3", [1.0, 2.0, 3.0], curvature="woodbury"))
    folders = [
        run_folders.unlearn(
            tmp_path / f"u{i}", [(0, 1.0, 1.0), (1, 2.0, 1.0)], (2.0, 1.0), seed=i, ranking=str(ranking)
        )
        for i, ranking in enumerate(rankings)
    ]
    names = [series.name for series in frontier(load_runs(folders)).panels[0].series]
    assert names == [
        "npo, top:0.1, ranking soir, objective retain, 2 runs",
        "npo, top:0.1, ranking random",
        "npo, top:0.1, ranking soir, curvature woodbury",
    ]


def test_relative_paths_lead_from_where_the_runs_were_made(tmp_path, monkeypatch):
    # As made by commands given in tmp_path; the report is asked for elsewhere, where other folders have these names.
    made, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    folders = []
    for i in range(2):
        run_folders.rank(made / f"r{i}", [1.0, 2.0, 3.0], objective="retain")
        run_folders.rank(elsewhere / "runs" / f"r{i}", [1.0, 2.0, 3.0], method=("random", "soir")[i])
        path, places = [(0, 1.0, 1.0), (1, 2.0, 1.0)], {"out": f"runs/u{i}", "ranking": f"./runs/r{i}"}
        folders.append(run_folders.unlearn(made / f"u{i}", path, (2.0, 1.0), seed=i, **places))
        (made / f"u{i}" / "model").mkdir()
        summary, places = {"forget_quality": 0.5, "model_utility": 0.5}, {"out": f"runs/e{i}"}
        folders.append(run_folders.evaluate(made / f"e{i}", summary, model=f"runs/u{i}/model", **places))
    monkeypatch.chdir(elsewhere)
    losses, metrics = frontier(load_runs(folders)).panels
    assert [s.name for s in (*losses.series, *metrics.series)] == ["npo, top:0.1, 2 runs"] * 2
    run = load_runs(folders)[0]
    assert run.place_of("nowhere") == Path("nowhere") and run.place_of("/x") == Path("/x")
    (elsewhere / "here").mkdir()
    assert run.place_of("here") == Path("here")


def test_models_of_different_sizes_are_no_repeats(tmp_path):
    folders = []
    for i, size in enumerate((10, 10, 20)):
        folder = run_folders.unlearn(tmp_path / f"u{i}", [(0, 1.0, 1.0), (1, 2.0, 1.0)], (2.0, 1.0), seed=i)
        told = json.loads((folder / "verification.json").read_text())
        (folder / "verification.json").write_text(json.dumps({**told, "parameters": size}))
        folders.append(folder)
    names = [series.name for series in frontier(load_runs(folders)).panels[0].series]
    assert names == ["npo, top:0.1 (u0), 2 runs", "npo, top:0.1 (u2)"]


def test_metrics_of_repeats_of_unlearned_models(tmp_path):
    quality, utility = [1e-4, 1e-2], [0.4, 0.6]
    folders = []
    for i in range(2):
        made = run_folders.unlearn(tmp_path / f"u{i}", [(0, 1.0, 1.0), (1, 2.0, 1.0)], (2.0, 1.0), seed=i)
        (made / "model").mkdir()
        summary = {"forget_quality": quality[i], "model_utility": utility[i], "notes": {}}
        folders.append(run_folders.evaluate(tmp_path / f"e{i}", summary, model=str(made / "model")))
    folders.append(run_folders.evaluate(tmp_path / "full", {"forget_quality": 1.0, "model_utility": 0.5}, model="x"))
    (panel,) = frontier(load_runs(folders)).panels
    several, alone = panel.series
    assert (several.name, alone.name) == ("npo, top:0.1, 2 runs", "full") and panel.x.scale == "log"
    # Of p-values the logarithms count: mean -3, standard deviation sqrt(2).
    found = np.log10([several.x_low[0], several.x[0], several.x_high[0]])
    np.testing.assert_allclose(found, [-3 - math.sqrt(2), -3, -3 + math.sqrt(2)])
    spread = stdev(utility)
    np.testing.assert_allclose([several.y_low[0], several.y[0], several.y_high[0]], [0.5 - spread, 0.5, 0.5 + spread])
    assert (alone.x[0], alone.y[0], alone.x_low) == (1.0, 0.5, None)


def test_without_forget_quality_the_probability_is_drawn(tmp_path):
    summary = {
        "forget_quality": None,
        "forget_probability": 0.25,
        "model_utility": 0.5,
        "notes": {"forget_quality": "x"},
    }
    (panel,) = frontier(load_runs([run_folders.evaluate(tmp_path / "e", summary)])).panels
    assert panel.x.reverse and panel.series[0].x[0] == 0.25 and panel.series[0].name == "e"


def test_a_forget_quality_of_nothing_has_a_linear_axis(tmp_path):
    run = run_folders.evaluate(tmp_path / "e", {"forget_quality": 0.0, "model_utility": 0.5})
    (panel,) = frontier(load_runs([run])).panels
    assert panel.x.scale == "linear" and panel.series[0].x[0] == 0.0


@pytest.mark.parametrize("note", [ITSELF, LOG_ITSELF])
def test_a_model_that_was_compared_with_itself_is_marked(tmp_path, note):
    own = {"forget_quality": 1.0, "model_utility": 0.5, "notes": {"forget_quality": note}}
    other = {"forget_quality": 0.1, "model_utility": 0.4, "notes": {"forget_quality": "of 3 rows"}}
    data = frontier(load_runs([run_folders.evaluate(tmp_path / n, told) for n, told in (("a", own), ("b", other))]))
    assert [(series.name, series.hollow) for series in data.panels[0].series] == [
        ("a (compared with itself)", True),
        ("b", False),
    ]
    assert "A hollow marker is a model that was compared with itself" in data.caption
    drawn = tmp_path / "f.svg"
    draw(data, drawn, LIGHT)
    assert (
        ">a (compared with itself)<" in drawn.read_text()
        and "hollow" not in frontier(load_runs([run_folders.evaluate(tmp_path / "c", other)])).caption
    )


def test_of_repeats_those_that_were_compared_with_themselves_are_counted(tmp_path):
    folders = []
    for seed in range(2):
        run_folders.unlearn(tmp_path / f"u{seed}", [(0, 1.0, 1.0), (1, 2.0, 1.0)], (2.0, 1.0), seed=seed)
        (tmp_path / f"u{seed}" / "model").mkdir()
        told = {"forget_quality": 1.0, "model_utility": 0.5, "notes": {"forget_quality": ITSELF} if seed else {}}
        folders.append(run_folders.evaluate(tmp_path / f"e{seed}", told, model=str(tmp_path / f"u{seed}" / "model")))
    ((series,),) = (panel.series for panel in frontier(load_runs(folders)).panels)
    assert series.hollow and series.name == "npo, top:0.1, 2 runs (1 of them compared with itself)"


def test_every_score_of_knowundo_has_a_panel(tmp_path):
    summary = {
        f"{what}_success_{score}": 0.25 for what in ("unlearn", "retention") for score in ("probability", "rouge")
    }
    panels = frontier(load_runs([run_folders.evaluate(tmp_path / "e", summary)])).panels
    assert [panel.x.label for panel in panels] == ["unlearn success, probability", "unlearn success, rouge"]


def test_metrics_are_a_row_a_run_with_reasons_said_once(tmp_path):
    folders = [
        run_folders.evaluate(tmp_path / "a", {"model_utility": 0.5, "leak": None, "notes": {"leak": "no holdout"}}),
        run_folders.evaluate(
            tmp_path / "b", {"model_utility": 0.25, "leak": None, "quality": 0.125, "kind": "x",
                             "notes": {"leak": "no holdout", "quality": "of 3 rows"}},
        ),
    ]  # fmt: skip
    table = metric_table(load_runs(folders)).table
    assert [column.label for column in table.columns] == ["run", "model utility", "leak", "quality"]
    assert table.rows == (("a", 0.5, None, None), ("b", 0.25, None, 0.125))
    assert table.notes == ("leak: no holdout", "quality of b: of 3 rows")


def test_compression_curves_are_of_the_first_workload_and_all_samples(tmp_path):
    whole = {"workload": "w", "method": "soir", "n": 60, "retain_samples": 60, "forget_samples": 5}
    whole["storage"] = "float32"
    rows = [
        {**whole, "kind": "sjlt", "k": 16, "store_bytes": 200, "median_error": 0.0, "pass_over_plain": 3.0},
        {**whole, "kind": "sjlt", "k": 8, "store_bytes": 100, "median_error": 0.5, "pass_over_plain": 2.0},
        {**whole, "kind": "sjlt", "k": 8, "store_bytes": 50, "median_error": 0.4, "storage": "bfloat16"},
        {**whole, "kind": "none", "k": 0, "store_bytes": 0, "median_error": 0.75},
        {**whole, "kind": "oporp", "k": 8, "store_bytes": 100, "median_error": 0.25},
        {**whole, "kind": "oporp", "k": 4, "store_bytes": 50, "median_error": 0.3, "n": 25},
        {**whole, "method": "timing", "kind": "sjlt", "k": 8, "over_plain": 1.5},
        {**whole, "kind": "gaussian", "k": 8, "store_bytes": 7, "median_error": 0.1, "workload": "v"},
    ]  # fmt: skip
    data = compression_curves(load_runs([run_folders.compression(tmp_path / "c.parquet", rows)]))
    by_bytes, by_time = data.panels
    oporp, sjlt = by_bytes.series
    assert (oporp.name, sjlt.name, by_bytes.levels[0].value) == ("oporp", "sjlt", 0.75)
    np.testing.assert_array_equal([sjlt.x, sjlt.y], [[100, 200], [0.5, 1e-9]])
    np.testing.assert_array_equal([oporp.x, oporp.y], [[100], [0.25]])
    np.testing.assert_array_equal([by_time.series[0].x, by_time.series[0].y], [[1.5, 3.0], [0.5, 1e-9]])
    assert by_bytes.x.text == "sketches of the retain set (bytes)" and "Workload w" in data.caption


def test_compression_workloads_have_a_panel_each(tmp_path):
    def row(workload, kind, k, error, **changes):
        whole = {"method": "soir", "n": 60, "retain_samples": 60, "storage": "float32", "store_bytes": 10 * k}
        return {"workload": workload, "kind": kind, "k": k, "median_error": error, **whole, **changes}

    rows = [
        row("w", "sjlt", 8, 0.5), row("w", "sjlt", 16, 0.25), row("w", "none", 0, 0.75),
        row("w", "oporp", 8, 0.1, n=30),
        row("v", "gaussian", 8, 0.125), row("v", "sjlt", 8, 0.0625, method="woodbury"),
    ]  # fmt: skip
    study = run_folders.compression(tmp_path / "c.parquet", rows)
    first, second = compression_workloads(load_runs([study])).panels
    assert (first.title, second.title) == ("w", "v")
    assert [(s.name, s.x.tolist(), s.y.tolist()) for s in first.series] == [("sjlt", [80, 160], [0.5, 0.25])]
    assert [(s.name, s.x.tolist(), s.y.tolist()) for s in second.series] == [("gaussian", [80], [0.125])]
    assert [level.value for level in first.levels] == [0.75] and second.levels == ()
    other = run_folders.compression(tmp_path / "d.parquet", rows[:1])
    assert compression_workloads(load_runs([other])) is None
    titles = [panel.title for panel in compression_workloads(load_runs([study, other])).panels]
    assert titles == ["w (c)", "v (c)", "w (d)"]


def test_losses_are_drawn_where_they_were_measured(tmp_path):
    run = run_folders.unlearn(tmp_path / "u", [(0, 1.0, 1.0), (1, None, None), (2, 3.0, 0.1)], (3.0, 0.1))
    log = {"log": {"step": [1, 2], "loss": [2.0, 1.0], "eval_loss": [None, None], "lr": [0.1, 0.2]}}
    log["log"]["eval_loss"] = pa.array([None, None], pa.float64())
    trained = run_folders.write(tmp_path / "f", {"settings": {}, "result": {"epoch_losses": [1.0]}}, log)
    first, second = training_curves(load_runs([run, trained])).panels
    assert [(s.name, s.x.tolist(), s.y.tolist(), s.style) for s in first.series] == [
        ("loss on the forget set", [0.0, 2.0], [1.0, 3.0], 2),
        ("loss on the retain set", [0.0, 2.0], [1.0, 0.1], 3),
    ]
    assert (first.y.text, first.y.scale, second.y.scale) == ("loss (nats a token)", "log", "linear")
    assert [(s.name, s.y.tolist()) for s in second.series] == [("training loss", [2.0, 1.0])]


def test_runs_with_nothing_to_draw_give_no_figure(tmp_path):
    log = {"log": {"step": [1], "loss": [2.0]}}
    run = run_folders.write(tmp_path / "x", {"settings": {}, "experiment": {"name": "n"}}, log)
    assert figures_of(load_runs([run])) == []


def test_numbers_for_a_person():
    shown = {
        None: "–",
        math.nan: "–",
        1234567: "1,234,567",
        0.83: "0.8300",
        1.91e-05: "1.910e-05",
        math.inf: "∞",
        "a": "a",
    }
    assert {value: number(value) for value in shown} == shown
    assert (number(True), number(0.0), number(1234.0)) == ("True", "0.000", "1234")
