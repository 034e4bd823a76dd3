"""Figures of the studies' files, against the same figures worked out by hand or by scipy."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fillm.report.figures import figures_of
from fillm.report.figures.frontier import frontier
from fillm.report.figures.study_damage import study_damage
from fillm.report.figures.study_means import study_means
from fillm.report.runs import load_runs
from tests.report.run_folders import compression, experiments, masked, result_file


def interval(values, logarithmic=False):
    """Mean and ends of the 95 % interval, by scipy."""
    values = np.log(values) if logarithmic else np.array(values)
    mean = values.mean()
    ends = [mean, *stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))]
    return np.exp(ends) if logarithmic else ends


def ends(series, index, axis="x"):
    return [getattr(series, f"{axis}{end}")[index] for end in ("", "_low", "_high")]


def tried(choice, seed, lr, steps, low, high, loss="ga"):
    """A row of the study that writes down every rate."""
    row = masked(choice, seed, low, high, loss, lr=lr, steps=steps, model_parameters=5)
    return {name: value for name, value in row.items() if name != "family"}


def test_the_study_of_masks_takes_the_best_rate_of_every_model(tmp_path):
    rows = [
        tried("whole model", 0, 0.1, 60, 0.5, 1.0),
        tried("whole model", 0, 0.2, 20, 0.25, math.nan),
        tried("whole model", 0, 0.4, 2, 0.01, 0.02),  # too coarse: a lower rate was tried
        tried("whole model", 1, 0.1, 2, 0.75, 2.0),
        tried("random 0", 0, 0.1, 60, 1.0, math.nan),
        tried("random 1", 0, 0.1, 60, 4.0, math.nan),
        tried("random 0", 1, 0.1, 60, 3.0, math.nan),
        tried("soir top", 0, 0.1, 60, 3.0, 4.0, loss="npo"),
    ]
    data = frontier(load_runs([result_file(tmp_path / "unlearning.csv", rows)]))
    first, second = data.panels
    assert (first.title, second.title, data.columns, first.x.scale) == ("ga", "npo", 2, "log")
    assert first.y.categories == ("whole model", "random", "soir top")
    low, high = first.series
    np.testing.assert_allclose(ends(low, 0), interval([0.25, 0.75], logarithmic=True))
    np.testing.assert_allclose(ends(low, 1), interval([2.0, 3.0], logarithmic=True))  # draws of a model are one value
    np.testing.assert_allclose(low.x[2], math.nan)
    np.testing.assert_allclose(high.x, [math.sqrt(2.0), math.nan, math.nan])
    assert (low.name, high.name) == ("at a forget loss of 1", "at a forget loss of 2")
    assert high.labels[1] == "random: 0 of 3 got there" and first.levels[0].value == pytest.approx(math.sqrt(2.0))
    np.testing.assert_allclose(second.series[1].x, [math.nan, math.nan, 4.0])
    assert second.levels == () and "95 % interval of the mean over models by Student's t" in data.caption


def test_two_studies_have_panels_of_their_own(tmp_path):
    first = result_file(tmp_path / "a" / "x.csv", [masked("whole model", 0, 0.5, 1.0), masked("top", 0, 0.2, 0.3)])
    second = result_file(tmp_path / "b" / "x.csv", [masked("whole model", 0, 0.0, -1.0)])
    runs = load_runs([first, second])
    panels = frontier(runs).panels
    assert [panel.title for panel in panels] == ["a/x.csv: ga", "b/x.csv: ga"] and all(p.new_row for p in panels)
    assert panels[1].x.scale == "linear" and panels[1].series[1].x[0] == -1.0  # no logarithm of what is not above 0
    assert [figure.name for figure in study_damage(runs)] == ["a_x_damage", "a_x_damage_table"]


def test_damage_is_over_that_of_the_whole_model_in_the_same_model(tmp_path):
    rows = [
        masked("whole model", 0, 0.3, 0.6), masked("whole model", 1, 0.5, math.nan),
        masked("soir top", 0, 0.2, 1.1), masked("soir top", 1, 0.9, 5.0),
        masked("random 0, 0.1", 0, 0.2), masked("random 1, 0.1", 0, 0.9), masked("random 0, 0.1", 1, 0.5),
        masked("random 1, 0.1", 1, math.nan),
    ]  # fmt: skip
    figure, table = study_damage(load_runs([result_file(tmp_path / "x.csv", rows)]))
    (panel,) = figure.panels
    assert panel.y.categories == ("soir top", "random, 0.1") and panel.levels[0].value == 1.0
    low, high = panel.series
    np.testing.assert_allclose(ends(low, 0), interval([0.5, 2.0], logarithmic=True))
    drawn = interval([math.sqrt(0.5 * 4.0), 1.0], logarithmic=True)
    np.testing.assert_allclose(ends(low, 1), drawn)
    np.testing.assert_allclose(ends(high, 0), [2.0, math.nan, math.nan])  # of the model whose whole got there
    assert low.labels == ("soir top: 2 models", "random, 0.1: 2 models, 1 never got there")
    assert [row[:2] for row in table.table.rows] == [
        ("soir top", "ga, 1"), ("soir top", "ga, 2"), ("random, 0.1", "ga, 1"), ("random, 0.1", "ga, 2")
    ]  # fmt: skip
    np.testing.assert_allclose(table.table.rows[2][2:5], drawn)
    assert [row[5:] for row in table.table.rows] == [(2, 0), (1, 0), (2, 1), (0, 2)]


def test_a_study_without_the_whole_model_has_no_ratio(tmp_path):
    runs = load_runs([result_file(tmp_path / "x.csv", [masked("top", 0, 0.5, 1.0)])])
    assert study_damage(runs) == [] and [figure.name for figure in figures_of(runs)] == ["frontier"]


def test_a_study_says_what_was_claimed(tmp_path):
    figures = figures_of(load_runs([experiments(tmp_path)]))
    names = ["frontier", "which_mask_damage", "which_mask_damage_table", "moved_shift"]
    assert [figure.name for figure in figures] == names
    assert figures[1].title == "Damage at equal forgetting: Which mask keeps most"
    for figure in figures[1:3]:
        assert figure.caption.endswith(" What was claimed: The top is <b>best</b>. Source: A paper.")
    assert figures[3].title == "moved" and "claimed" not in figures[3].caption


def test_the_committed_studies_are_drawn_with_their_claims():
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "experiments"
    runs = load_runs([results])
    assert len(runs) == len(list(results.glob("*.csv"))) and all(run.study["claim"] for run in runs)
    names = [figure.name for figure in figures_of(runs)]
    for run in runs:
        assert any(name.startswith(f"{run.name}_") for name in names), run.name


def test_shifts_are_a_line_a_kind_over_layers(tmp_path):
    row = {"family": "llama", "seed": 0, "kind": "mlp", "layer": 0, "relative_shift": 1.0}
    rows = [
        {**row, "tensor": "a"}, {**row, "tensor": "b", "relative_shift": 2.0},
        {**row, "tensor": "a", "seed": 1, "relative_shift": 3.5}, {**row, "tensor": "e", "kind": "embed", "layer": -1},
    ]  # fmt: skip
    (figure,) = study_means(load_runs([result_file(tmp_path / "x.csv", rows)]))
    (panel,) = figure.panels
    assert figure.name == "x_shift" and panel.x.categories == ("outside", "0")
    mlp, embed = panel.series
    assert (mlp.name, mlp.x.tolist(), embed.x.tolist()) == ("mlp", [1.0], [0.0])
    np.testing.assert_allclose(ends(mlp, 0, "y"), interval([1.5, 3.5]))  # matrices of one model are one value
    assert mlp.labels == ("2 models",) and embed.labels == ("1 models",)


def test_layers_have_both_rises_in_a_panel_a_loss_and_number_of_steps(tmp_path):
    row = {"family": "llama", "layer": "layer 0", "loss": "ga", "steps": 4, "forget_start": 0.5, "retain_start": 0.25}
    rows = [{**row, "seed": seed, "forget_end": 1.0 + seed, "retain_end": 0.5} for seed in range(3)]
    rows.append({**rows[0], "steps": 8, "layer": "layer 1"})
    (figure,) = study_means(load_runs([result_file(tmp_path / "x.csv", rows)]))
    first, second = figure.panels
    assert (figure.name, first.title, second.title) == ("x_layers", "ga, 4 steps", "ga, 8 steps")
    forget, retain = first.series
    np.testing.assert_allclose(ends(forget, 0, "y"), interval([0.5, 1.5, 2.5]))
    np.testing.assert_allclose(ends(retain, 0, "y"), [0.25] * 3)
    assert second.series[0].x.tolist() == [1.0] and math.isnan(second.series[0].y_low[0])


def test_curvatures_are_a_line_a_pair_over_numbers_of_samples(tmp_path):
    row = {"family": "llama", "scope": "mlp", "one": "datainf", "other": "woodbury", "retain_samples": 10}
    rows = [{**row, "seed": seed, "spearman": 0.5 + 0.1 * seed} for seed in range(3)]
    rows += [{**rows[0], "retain_samples": 5, "spearman": math.nan}, {**rows[0], "other": "diagonal"}]
    (figure,) = study_means(load_runs([result_file(tmp_path / "x.csv", rows)]))
    (panel,) = figure.panels
    assert (figure.name, panel.title) == ("x_curvatures", "mlp")
    assert [series.name for series in panel.series] == ["datainf against woodbury", "datainf against diagonal"]
    assert panel.series[0].x.tolist() == [5.0, 10.0] and math.isnan(panel.series[0].y[0])
    np.testing.assert_allclose(ends(panel.series[0], 1, "y"), interval([0.5, 0.6, 0.7]))


def test_the_comparison_with_the_retain_only_model_is_a_panel_a_loss(tmp_path):
    path = tmp_path / "forget_quality.csv"
    lines = [
        "seed,choice,loss,lr,forget_quality,model_utility",
        "0,full model,none,nan,1e-10,0.9",
        "0,retain-only model,none,nan,1,0.8",
        "0,whole model,ga,0.1,1e-2,0.5",
        "1,whole model,ga,0.1,1e-4,0.7",
        "0,random 0,ga,0.1,1e-6,0.4",
        "0,whole model,npo,0.1,0,0.3",
    ]
    path.write_text("\n".join(lines) + "\n")
    data = frontier(load_runs([path]))
    first, second = data.panels
    assert (first.title, second.title) == ("ga", "npo")
    assert [series.name for series in first.series] == ["full model", "whole model", "random"]
    assert [series.hollow for series in first.series] == [True, False, False]
    whole = first.series[1]
    np.testing.assert_allclose(ends(whole, 0), interval([1e-2, 1e-4], logarithmic=True))
    np.testing.assert_allclose(ends(whole, 0, "y"), interval([0.5, 0.7]))
    assert first.series[2].x_low is None and first.x.scale == "log"
    assert second.x.scale == "linear" and [series.style for series in second.series] == [0, 1]  # 0 has no logarithm
    assert "compared with itself" not in data.caption


def test_files_of_one_name_have_figures_of_two(tmp_path):
    rows = [{"workload": "w", "method": "soir", "kind": "oporp", "k": 4, "store_bytes": 8}]
    shift = {"family": "a", "seed": 0, "tensor": "t", "kind": "mlp", "layer": 0, "relative_shift": 1.0}
    paths = [result_file(tmp_path / name, [shift]) for name in ("a b.csv", "a-b.csv", "\u00e4.csv")]
    runs = load_runs([*paths, compression(tmp_path / "c.parquet", rows)])
    assert [figure.name for figure in study_means(runs)] == ["a_b_shift", "a_b_2_shift", "study_shift"]
