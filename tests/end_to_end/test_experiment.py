"""The experiments: their files, their frame, what they compute from rows, and each of them on a tiny model."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import t

from benchmarks.experiment import __main__ as command
from benchmarks.experiment import forgetting, probe
from benchmarks.experiment.case import FAMILIES, Case, cases
from benchmarks.experiment.rankings import counts, spearman, top_overlap
from benchmarks.experiment.results import Rows, read
from benchmarks.experiment.settings import ExperimentConfig, experiments, read_plan
from benchmarks.experiment.studies import layer_robustness, layer_spread, parameter_shift
from benchmarks.experiment.studies.objective_search import cheapest
from benchmarks.unlearning.study import losses_after
from fillm.models import load_model
from fillm.rank.path_step import FIRST_LENGTH
from fillm.report.figures.damage import WHOLE, against_whole, merged
from fillm.report.figures.intervals import interval, student_t

QUICK = ExperimentConfig(experiment=("layer_robustness",), quick=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FILLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def case(cache) -> Case:
    [one] = cases(QUICK, read_plan(QUICK, FAMILIES), lambda line: None)
    return one


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_names_a_study_and_settings_that_it_takes(name):
    plan = read_plan(ExperimentConfig(experiment=(name,)), FAMILIES)
    study = importlib.import_module(f"benchmarks.experiment.studies.{plan.study}")
    assert set(plan.settings) <= set(study.DEFAULTS)
    assert set(study.KEY) <= set(study.COLUMNS)
    assert len(set(plan.seeds)) == len(plan.seeds) >= 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one experiment of band_sweep"),
        (["nothing"], "there is no experiment nothing"),
        (["band_sweep", "second_order"], "give one experiment"),
        (["band_sweep", "--families", "elm"], "there is no elm; there are llama"),
        (["band_sweep", "--part", "3/2"], "give I/N"),
        (["band_sweep", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["band_sweep", "--base-model", "x"], "--base-model goes with --model"),
        (["band_sweep", "--model", "x", "--seeds", "3"], "--seeds is of the small models and --model is one model"),
        (["band_sweep", "--model", "x", "--families", "llama"], "--families is of the small models"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, tmp_path):
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_every_experiment_runs_and_goes_on(name, cache, tmp_path, capsys):
    arguments = [name, "--quick", "--out", str(tmp_path)]
    if name.endswith("_tofu"):  # whose rows are not at hand everywhere
        arguments += ["--forget", "fictional-small:forget05", "--retain", "fictional-small:retain95"]
    assert command.main([*arguments, "--minutes", "1e-9"]) == 0
    [first] = read(tmp_path / f"{name}.csv")
    assert command.main([*arguments, "--resume"]) == 0
    rows = read(tmp_path / f"{name}.csv")
    assert len(rows) > 1 and str(rows[0]) == str(first)
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "\nclaim: " in said and "\nsource: " in said
    before = (tmp_path / f"{name}.csv").read_bytes()
    assert command.main([*arguments, "--resume"]) == 0
    assert (tmp_path / f"{name}.csv").read_bytes() == before


def test_rows_of_another_command_are_not_continued(tmp_path):
    path = tmp_path / "rows.csv"
    rows = Rows(path, ("what", "value"), "one", resume=True)
    rows.add({"family": "llama", "seed": 0, "what": "a", "value": 0.123456789})
    [again] = Rows(path, ("what", "value"), "one", resume=True).records
    assert (again["family"], again["seed"], again["what"], again["value"]) == ("llama", 0, "a", 0.123457)
    assert rows.of("llama", 0) == [again] and rows.of("llama", 1) == []
    assert Rows(path, ("what", "value"), "other", resume=True).records == []


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 4.0])
    half = 4.302652729911275 * np.std([1.0, 2.0, 4.0], ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom, 97.5 %
    np.testing.assert_allclose([found.mean, found.low, found.high], [7 / 3, 7 / 3 - half, 7 / 3 + half], rtol=1e-9)
    found = interval([1.0, 4.0], geometric=True)
    half = 12.706204736432095 * np.std([0.0, math.log(4.0)], ddof=1) / math.sqrt(2)
    np.testing.assert_allclose([found.mean, found.high], [2.0, 2.0 * math.exp(half)], rtol=1e-9)
    assert str(interval([0.5])) == "0.5" and str(interval([])) == "-"


def test_students_t_is_that_of_scipy():
    degrees = [*range(1, 40), 99, 100, 1000]
    np.testing.assert_allclose([student_t(n) for n in degrees], t.ppf(0.975, degrees), rtol=1e-12)


def row(choice, seed, retain, loss="ga"):
    return {
        "family": "llama", "seed": seed, "choice": choice, "loss": loss, "retain_start": 0.1, "retain_at_low": retain,
        "retain_at_high": math.nan, "forget_low": 1.0, "forget_high": 2.0,
    }  # fmt: skip


def test_damage_is_compared_within_a_model_and_draws_are_one_value():
    rows = [row("whole model", 0, 0.3), row("whole model", 1, 0.5), row("soir top", 0, 0.2), row("soir top", 1, 0.9)]
    found, never = against_whole(rows, "soir top", "ga")
    assert (found.count, never) == (2, 0) and found.mean == pytest.approx(math.sqrt(0.5 * 2.0), rel=1e-12)
    draws = [row("random 0", 0, 0.2), row("random 1", 0, 0.9), row("random 2", 0, math.nan)]
    found, never = against_whole([*rows, *draws], "random", "ga")
    assert (found.count, never) == (1, 1) and found.mean == pytest.approx(math.sqrt(0.5 * 4.0), rel=1e-12)
    found, never = against_whole(rows, "soir top", "ga", "retain_at_high")
    assert (found.count, never) == (0, 0)  # the whole model never got there: no measure of a part
    assert "| soir top | 1 (" in forgetting.table(rows, "x")
    assert merged("random 2, 0.1") == "random, 0.1" and merged("random: top 0.1") == "random: top 0.1"


def test_the_cheapest_tensors_fill_a_budget_in_order():
    sizes = {"a": 10, "b": 60, "c": 20, "d": 10}
    scope = [SimpleNamespace(name=name, numel=n) for name, n in sizes.items()]
    costs = {"a": 3.0, "b": math.inf, "c": 1.0, "d": 2.0}
    assert cheapest(costs, scope, 0.3) == ["c", "d"]
    assert cheapest(costs, scope, 0.39) == ["c", "d"]
    assert cheapest(costs, scope, 0.01) == ["c"]  # one at least
    assert cheapest(costs, scope, 1.0) == ["c", "d", "a", "b"]


def test_agreement_of_rankings():
    one, other = {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 30.0, "c": 10.0, "b": 20.0, "d": 99.0}
    assert spearman(one, other) == pytest.approx(1.0) and top_overlap(one, other) == 0.0
    assert counts(40, [10, 20, 80]) == [10, 20, 40]


def test_a_step_that_raises_the_forget_loss_is_found_and_undone(case):
    name = next(name for name, _ in case.model.named_parameters() if "down_proj" in name)
    parameter = dict(case.model.named_parameters())[name]
    before = parameter.detach().clone()

    def loss_of(which):
        """Sample by sample, by transformers' own loss."""
        losses = []
        for fields in (row.fields for row in case.rows[which]):
            begin = case.tokenizer(f"Question: {fields['question']}\nAnswer:")["input_ids"]
            end = [*case.tokenizer(f" {fields['answer']}", add_special_tokens=False)["input_ids"]]
            ids = torch.tensor([[*begin, *end, case.tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[0, : len(begin)] = -100
            losses.append(case.model(input_ids=ids, labels=labels).loss)
        return torch.stack(losses).mean()

    parameter.requires_grad_(True)
    forget = loss_of("forget")
    [gradient] = torch.autograd.grad(forget, parameter)
    parameter.requires_grad_(False)
    start = {which: float(loss_of(which)) for which in ("forget", "retain")}
    rise = 0.05
    cost = probe.step_costs(case, [name], rise)[name]
    assert torch.equal(parameter, before)
    length = FIRST_LENGTH
    while True:  # the length at which the cost was read, on the grid of the search
        with torch.no_grad():
            parameter.add_(gradient.sign(), alpha=length)
        risen = float(loss_of("forget")) - start["forget"]
        there = float(loss_of("retain")) - start["retain"]
        with torch.no_grad():
            parameter.copy_(before)
        if risen >= rise:
            break
        length *= 2.0
    assert 0 < cost <= there * (1 + 1e-3) + 1e-6  # found between that length and half of it
    with torch.no_grad():
        parameter.add_(gradient.sign(), alpha=length / 2)
    half = float(loss_of("retain")) - start["retain"]
    with torch.no_grad():
        parameter.copy_(before)
    assert cost >= half * (1 - 1e-3) - 1e-6
    assert probe.step_costs(case, [name], 1e9)[name] == math.inf


def test_masks_cover_every_matrix_once_by_layer_and_once_by_kind(case):
    found = layer_robustness.masks(case)
    layers = [mask for name, mask in found.items() if name.startswith("layer ")]
    kinds = [mask for name, mask in found.items() if not name.startswith("layer ") and name != WHOLE]
    for parts in (layers, kinds):
        names = [name for mask in parts for name in mask]
        assert len(names) == len(set(names))
    assert {name for mask in layers for name in mask} == {name for mask in kinds for name in mask}
    assert len(found[WHOLE]) == len(dict(case.model.named_parameters()))


def test_shifts_are_lengths_of_what_training_changed(case):
    base = load_model(str(case.base()), device="cpu").state_dict()
    now = case.model.state_dict()
    rows = {row["tensor"]: row for row in parameter_shift.records(case, {}, [])}
    for name, row in rows.items():
        before, after = (np.asarray(state[name].tolist()) for state in (base, now))
        assert row["relative_shift"] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)
        assert row["shift"] == pytest.approx(np.sqrt(np.mean((after - before) ** 2)), rel=1e-6)
    assert {row["kind"] for row in rows.values()} >= {"embed", "attn", "mlp", "lm_head"}
    # The base is what training began with, not another draw: two draws are 1.4 lengths apart, one epoch moves less.
    assert max(row["relative_shift"] for row in rows.values()) < 1.0
    assert list(parameter_shift.records(case, {}, list(rows.values()))) == []


def test_equal_steps_are_equal_whatever_the_losses_become(case):
    mask = layer_robustness.masks(case)["layer 0"]
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    config = forgetting.settings_of({**forgetting.DEFAULTS, "max_steps": 6, "eval_every": 2}, False)
    losses = losses_after(config, case, mask, "ga", 0.05)
    assert list(losses) == [0, 2, 4, 6] and losses[6][0] > losses[0][0] > max(config.levels)
    seldom = forgetting.settings_of({**forgetting.DEFAULTS, "max_steps": 6, "eval_every": 6}, False)
    assert losses_after(seldom, case, mask, "ga", 0.05) == {step: losses[step] for step in (0, 6)}
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def test_the_rise_after_equal_steps_is_a_mean_over_models():
    rows = [
        {"choice": "layer 0", "loss": "ga", "forget_start": 0.1, "forget_after_fixed": after} for after in (1.1, 2.1)
    ]
    found = layer_robustness.rise(rows, "layer 0", "ga", "forget")
    assert (found.mean, found.count) == (pytest.approx(1.5), 2)


def test_the_spread_over_layers_is_that_of_the_rises():
    rows = [
        {"family": "llama", "seed": 0, "loss": "ga", "steps": 4, "forget_start": 0.0, "forget_end": f,
         "retain_start": 0.1, "retain_end": 0.1 + r}
        for f, r in ((1.0, 0.2), (1.0, 0.4), (1.0, 0.6))
    ]  # fmt: skip
    found = layer_spread.spreads(rows, "ga", 4)
    assert found["forget"].mean == pytest.approx(0.0, abs=1e-12) and found["retain"].mean == pytest.approx(0.5)
    found = layer_spread.ranges(rows, "ga", 4)
    assert found["forget"].mean == pytest.approx(0.0, abs=1e-12) and found["retain"].mean == pytest.approx(0.4)
    fallen = [{**row, "retain_end": 0.1 - (row["retain_end"] - 0.1)} for row in rows]
    assert layer_spread.spreads(fallen, "ga", 4)["retain"].count == 0
    assert "| ga | 4 |" in layer_spread.summary(fallen) and "| 1 and 0 |" in layer_spread.summary(fallen)
    two = [{**row, "seed": 1, "forget_end": 1.0 + k, "retain_end": 0.1 + (1.0 + k)} for k, row in enumerate(rows)]
    found = layer_spread.difference([*rows, *two], "ga", 4)  # 0.5 - 0 in one model, none in the other
    assert (found.mean, found.count) == (pytest.approx(0.25), 2)
