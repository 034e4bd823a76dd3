import math
from statistics import stdev

import numpy as np
import torch
from safetensors.torch import save_file

from fillm.models import catalogue
from fillm.report.figures.parameter_shift import parameter_shift
from fillm.report.runs import load_runs
from tests.families import build_family
from tests.report import run_folders


def weights(folder, **tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name.replace("__", "."): torch.tensor(values) for name, values in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def test_the_shift_is_relative_to_the_weights_before(tmp_path):
    base = weights(tmp_path / "base", h__0__w=[3.0, 4.0], h__1__w=[1.0, 0.0], h__1__b=[0.0, 2.0], wte=[2.0], gone=[1.0])
    folders = []
    for seed, last in enumerate((4.0, 3.0)):
        run = run_folders.unlearn(
            tmp_path / f"u{seed}", [(0, 1.0, 1.0), (1, 1.0, 1.0)], (1.0, 1.0), seed=seed, model=str(base)
        )
        weights(run / "model", h__0__w=[3.0, 4.0], h__1__w=[1.0, 1.0], h__1__b=[2.0, 2.0], wte=[last])
        folders.append(run)
    data = parameter_shift(load_runs(folders))
    (panel,) = data.panels
    (series,) = panel.series  # no configuration says what the tensors are
    assert series.name == "other" and panel.x.categories == ("–", "0", "1") and panel.title == "npo, top:0.1, 2 runs"
    # wte: 2/2 and 1/2; layer 0: nothing; layer 1: sqrt((1 + 4) / (1 + 4)) in both.
    np.testing.assert_allclose(series.y, [0.75, math.nan, math.nan, 1.0])
    np.testing.assert_allclose(series.y_high - series.y, [stdev([1.0, 0.5]), math.nan, math.nan, 0.0])
    np.testing.assert_array_equal(series.x, [0.0, 0.0, 1.0, 2.0])
    assert "u0: 1 tensors are in one of the two models alone" in data.caption


def test_the_kinds_of_a_model_are_those_of_its_catalogue(tmp_path):
    model = build_family("llama")
    model.save_pretrained(tmp_path / "base")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    run = run_folders.unlearn(tmp_path / "u", [(0, 1.0, 1.0), (1, 1.0, 1.0)], (1.0, 1.0), model=str(tmp_path / "base"))
    model.save_pretrained(run / "model")
    (panel,) = parameter_shift(load_runs([run])).panels
    found = {series.name: series.y[~np.isnan(series.y)] for series in panel.series}
    places = {tensor.name: (tensor.kind, tensor.layer) for tensor in catalogue(model)}
    for kind in ("mlp", "attn", "embed"):
        expected = []
        for layer in sorted({layer for of_kind, layer in places.values() if of_kind == kind}):
            names = [name for name, place in places.items() if place == (kind, layer)]
            moved = torch.cat([(model.get_parameter(name) - before[name]).flatten() for name in names])
            expected.append(float(moved.norm() / torch.cat([before[name].flatten() for name in names]).norm()))
        np.testing.assert_allclose(found.pop(kind), expected, rtol=1e-5)
    assert set(found) <= {"lm_head"}


def test_a_base_that_was_made_anew_is_not_compared(tmp_path):
    base = weights(tmp_path / "base", w=[1.0])
    (base / "run.yaml").write_text("fingerprints: {model: new}\n")
    log = {"log": {"step": [1], "loss": [2.0]}}
    record = {
        "settings": {"model": str(base)},
        "result": {"epoch_losses": []},
        "fingerprints": {"initial_model": "old"},
    }
    run = weights(run_folders.write(tmp_path / "f", record, log), w=[2.0])
    assert parameter_shift(load_runs([run])) is None
    (base / "run.yaml").write_text("fingerprints: {model: old}\n")
    (panel,) = parameter_shift(load_runs([run])).panels
    assert panel.title == "f" and panel.series[0].y[0] == 1.0


def test_the_shift_of_a_ranking_comes_from_its_scores_where_the_models_are_gone(tmp_path):
    run = run_folders.rank(tmp_path / "r", [2.0, 4.0, 6.0], method="parameter-shift", base_model="gone")
    (panel,) = parameter_shift(load_runs([run])).panels
    assert panel.y.text == "root mean square shift (weight)"
    found = {series.name: series.y[~np.isnan(series.y)].tolist() for series in panel.series}
    assert found == {"mlp": [2.0], "attn": [1.0], "embed": [3.0]}  # score / sqrt(4 weights)
    sums = run_folders.rank(tmp_path / "s", [2.0, 4.0, 6.0], method="parameter-shift", granularity="element")
    assert parameter_shift(load_runs([sums])) is None
