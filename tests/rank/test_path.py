"""The path ranking against its integrals written out in float64 autograd, one sample at a time."""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fillm import rank_parameters
from fillm.capture import Capture
from fillm.data import collate
from fillm.errors import UsageError
from fillm.rank import Ranking, path_step
from fillm.rank.path_step import DOUBLINGS, FIRST_LENGTH, HALVINGS, SignStep, find_length
from tests.capture.reference import sample_loss
from tests.families import build_family, build_lora
from tests.rank.direct import FORGET, FORGET_ROWS, RETAIN, RETAIN_ROWS
from tests.rank.test_units import UNITS, by_tensor, column

FAMILIES = ("llama", "gpt2")
WEIGHT, RISE, POINTS = 2.5, 0.2, 3
RTOL, ATOL = 1e-6, 3e-7  # of float64 models, and of their losses: some norms are in float32 whatever the weights are
SETTINGS = {"path_weight": WEIGHT, "path_rise": RISE, "path_points": POINTS}


def ranked(model: nn.Module, **settings) -> Ranking:
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, "path", **{**SETTINGS, **settings})


@cache
def wide(name: str) -> nn.Module:
    return build_family(name, dtype=torch.float64)


@cache
def by_weight(name: str) -> Ranking:
    return ranked(wide(name), granularity="element")


class Line:
    """Losses and gradients of a model's copy along the sign of its forget gradient, tensors outside `names` at rest."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = copy.deepcopy(model).double().requires_grad_(True)
        parameters = dict(self.model.named_parameters())
        self.names, self.weights = names, [parameters[name] for name in names]
        self.start = [weight.detach().clone() for weight in self.weights]
        self.signs = [torch.zeros_like(weight) for weight in self.weights]
        gradients = self.at(0.0, FORGET)[1]
        self.signs = [gradient.sign() for gradient in gradients]
        # Of a key bias without rotary positions: what is zero in exact arithmetic has a sign by chance.
        self.quiet = [(gradient.abs() < 1e-14) & (gradient != 0) for gradient in gradients]

    def at(self, length: float, samples) -> tuple[float, list[Tensor]]:
        for weight, value, sign in zip(self.weights, self.start, self.signs, strict=True):
            weight.data = value + length * sign
        loss = sum(sample_loss(self.model, sample) for sample in samples) / len(samples)
        found = torch.autograd.grad(loss, self.weights, allow_unused=True)
        pairs = zip(found, self.weights, strict=True)
        return float(loss.detach()), [torch.zeros_like(w) if g is None else g for g, w in pairs]

    def contributions(self, length: float, points: int, samples) -> dict[str, Tensor]:
        """By the midpoint rule."""
        places = [(k + 0.5) / points * length for k in range(points)]
        sums = [sum(parts) for parts in zip(*(self.at(place, samples)[1] for place in places), strict=True)]
        return {
            name: total * sign * (length / points)
            for name, total, sign in zip(self.names, sums, self.signs, strict=True)
        }


@cache
def expected(name: str) -> tuple[Line, dict[str, Tensor], dict[str, Tensor]]:
    """The line, gain and damage of every weight at the length that the ranking says it went."""
    line = Line(wide(name), [tensor for tensor, _ in wide(name).named_parameters()])
    length = by_weight(name).record["path"]["length"]
    return line, line.contributions(length, POINTS, FORGET), line.contributions(length, POINTS, RETAIN)


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_scored_by_gain_less_so_many_times_the_damage(name):
    line, gain, damage = expected(name)
    ranking = by_weight(name)
    still = 0
    for tensor, sign, quiet in zip(line.names, line.signs, line.quiet, strict=True):
        found, score = ranking.updates[f"scores/{tensor}"], gain[tensor] - WEIGHT * damage[tensor]
        assert torch.equal((found == -math.inf)[~quiet], (sign == 0)[~quiet]), tensor
        still += int((sign == 0).sum())
        moved = (sign != 0) & ~quiet
        scale = float(score.abs().max())
        assert float((found - score)[moved].abs().max()) <= RTOL * scale, tensor
    assert 0 < still < sum(sign.numel() for sign in line.signs) // 2  # embeddings of tokens that stand in no row


@pytest.mark.parametrize("granularity", ["tensor", "row", "head", "element"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_unit_has_the_sum_of_its_weights(name, granularity):
    line, gain, damage = expected(name)
    ranking = ranked(wide(name), granularity=granularity)
    rows = by_tensor(ranking)
    for tensor, sign, quiet in zip(line.names, line.signs, line.quiet, strict=True):
        if UNITS[granularity](tensor, name, gain[tensor]) is None:
            assert tensor not in rows
            continue
        units = UNITS["tensor" if granularity == "element" else granularity]
        g, d = (units(tensor, name, part[tensor]).sum(1) for part in (gain, damage))
        for found, exact in (("predicted_forget_gain", g), ("retain_damage", d), ("score", g - WEIGHT * d)):
            scale = float(max(g.abs().max(), d.abs().max()))
            assert float((column(rows[tensor], found) - exact).abs().max()) <= RTOL * scale, (tensor, found)
        idle, sure = (units(tensor, name, sign) == 0).all(1), ~units(tensor, name, quiet).any(1)
        found = torch.tensor([row["note"] == "unused" for row in rows[tensor]])
        assert torch.equal(found[sure], idle[sure]), tensor
    scores = [row["score"] for row in ranking if row["note"] != "unused"]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    assert (ranking.updates is None) == (granularity != "element")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_step_ends_where_the_forget_loss_has_risen_by_so_much(name):
    line = expected(name)[0]
    path = by_weight(name).record["path"]
    start = {which: line.at(0.0, samples)[0] for which, samples in (("forget", FORGET), ("retain", RETAIN))}
    assert path["forget_rise"] == pytest.approx(line.at(path["length"], FORGET)[0] - start["forget"], abs=ATOL)
    assert path["retain_rise"] == pytest.approx(line.at(path["length"], RETAIN)[0] - start["retain"], abs=ATOL)
    assert path["forget_rise"] >= RISE > line.at(path["length"] / 33 * 32, FORGET)[0] - start["forget"]
    assert path["forget_contributions"] == pytest.approx(path["forget_rise"], rel=1e-2)
    missed = abs(path["retain_contributions"] - path["retain_rise"])
    assert missed <= 1e-2 * path["forget_rise"]


def test_more_points_add_up_to_more_of_the_rises():
    missed = []
    for points in (1, 8):
        path = ranked(wide("llama"), path_points=points).record["path"]
        missed.append(abs(path["forget_contributions"] - path["forget_rise"]))
    assert missed[1] < missed[0] / 32  # the midpoint rule's error falls with the square of the pieces


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_weights_are_those_of_the_largest_scores(name):
    ranking = by_weight(name)
    names = sorted(ranking.names)
    flat = np.concatenate([ranking.updates[f"scores/{tensor}"].numpy().ravel() for tensor in names])
    best = np.argsort(-flat, kind="stable")
    for fraction in (0.3, 0.8):
        chosen = np.zeros(len(flat), dtype=bool)
        chosen[best[: int(fraction * len(flat))]] = True
        chosen &= np.isfinite(flat)
        mask = ranking.select(fraction)
        assert mask.count == chosen.sum()
        for tensor, part in zip(names, np.split(chosen, np.cumsum([_size(ranking, t) for t in names])), strict=False):
            found = mask[tensor].to_bool() if tensor in mask else torch.zeros(len(part), dtype=torch.bool)
            assert np.array_equal(found.numpy().ravel(), part), tensor
    assert ranking.select(1.0).count == np.isfinite(flat).sum() < len(flat)
    assert ranking.select(above=0.0).count == (flat > 0).sum()
    assert ranking.select(0.1, "bottom").count == int(0.1 * len(flat))


def _size(ranking: Ranking, tensor: str) -> int:
    return ranking.updates[f"scores/{tensor}"].numel()


@pytest.mark.parametrize("settings", [{"tokens_per_batch": 1}, {"tokens_per_batch": 50, "layout": "packed"}])
def test_scores_of_weights_do_not_depend_on_batches(settings):
    other = ranked(wide("llama"), granularity="element", **settings)
    ranking = by_weight("llama")
    assert other.record["path"] == pytest.approx(ranking.record["path"], abs=ATOL)
    for tensor, score in ranking.updates.items():
        moved = score.isfinite()
        assert float((other.updates[tensor] - score)[moved].abs().max()) <= RTOL * float(score[moved].abs().max())


def test_float32_is_near_float64():
    ranking = ranked(build_family("llama"), granularity="element")
    exact = Line(build_family("llama"), [name for name, _ in build_family("llama").named_parameters()])
    length = ranking.record["path"]["length"]
    gain, damage = (exact.contributions(length, POINTS, samples) for samples in (FORGET, RETAIN))
    found = torch.cat([ranking.updates[f"scores/{name}"].flatten() for name in exact.names]).double()
    score = torch.cat([(gain[name] - WEIGHT * damage[name]).flatten() for name in exact.names])
    moved = found.isfinite()
    assert float((found - score)[moved].norm() / score[moved].norm()) < 1e-4


def test_only_the_scope_is_moved():
    model = wide("llama")
    ranking = ranked(model, granularity="element", include="mlp")
    line = Line(model, sorted(ranking.names))
    length = ranking.record["path"]["length"]
    gain, damage = (line.contributions(length, POINTS, samples) for samples in (FORGET, RETAIN))
    for name in line.names:
        score = gain[name] - WEIGHT * damage[name]
        assert float((ranking.updates[f"scores/{name}"] - score).abs().max()) <= RTOL * float(score.abs().max()), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("after", [2, 9, 14])
def test_the_model_comes_back_to_the_bit_whatever_happens(monkeypatch, error, after):
    model = build_family("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real, seen = Capture.run, []

    def failing(self, batch, samples, observe):
        seen.append(not all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))
        if len(seen) == after:
            raise error
        return real(self, batch, samples, observe)

    monkeypatch.setattr(Capture, "run", failing)
    with pytest.raises(error):
        ranked(model, tokens_per_batch=40)
    assert any(seen) == (after > 5)  # it failed while the weights were moved
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rise_that_is_never_reached_is_one_line():
    model = build_family("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norm = "model.norm.weight"
    with pytest.raises(UsageError, match=r"--path-rise 1e\+06: .* rises by \d\S* at most, .* give less, or a wider"):
        ranked(model, path_rise=1e6, include=norm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_rise_below_the_shortest_step_is_one_line():
    with pytest.raises(UsageError, match="--path-rise 1e-09: the forget loss jumps past it"):
        ranked(wide("llama"), path_rise=1e-9)


def test_narrow_weights_are_refused_and_named():
    model = build_family("llama").to(torch.bfloat16)
    line = r"--method path moves weights by less than bfloat16 can tell apart \(\S*norm\S*\); give --dtype float32"
    with pytest.raises(UsageError, match=line):
        ranked(model, include="norm")


def test_a_float32_adapter_of_a_narrow_model_is_ranked():
    model = build_lora("llama", ["q_proj", "down_proj"])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora" in name else torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = ranked(model, include="lora", path_rise=0.5).record["path"]
    assert path["forget_rise"] >= 0.5
    assert path["forget_contributions"] == pytest.approx(path["forget_rise"], abs=0.05)  # activations are narrow
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_points_are_a_warning(caplog):
    ranked(wide("llama"), path_rise=3.0, path_points=1)
    assert any("give more --path-points than 1" in record.message for record in caplog.records)


def test_samples_that_influence_each_other_are_run_one_by_one(monkeypatch):
    model, seen, real = build_family("llama"), [], path_step.sample_losses
    capture = Capture(model, ["model.norm.weight"], alone="they see each other")

    def counted(model, batch, reduction):
        seen.append(len(batch.indices))
        return real(model, batch, reduction)

    monkeypatch.setattr(path_step, "sample_losses", counted)
    losses = path_step.ForwardLosses(capture).run(collate(FORGET, [2, 0, 1]), FORGET, lambda *given: None)
    assert seen == [1, 1, 1] and losses.dtype == torch.float64
    exact = [float(sample_loss(copy.deepcopy(model).double(), FORGET[position])) for position in (2, 0, 1)]
    assert losses.tolist() == pytest.approx(exact, rel=1e-5)


def test_lengths_are_doubled_or_halved_and_then_halved_between():
    for wanted in (3e-6, 7.7e-4, 1e-3, 2.5e-3, 1.99):
        tried = []

        def risen(length, tried=tried):
            tried.append(length)
            return length**2

        length = find_length(risen, wanted**2)
        assert wanted <= length <= wanted * 33 / 32 and len(tried) <= 1 + DOUBLINGS + HALVINGS
        assert len(set(tried)) == len(tried)
    assert find_length(lambda length: 0.0, 1.0) is None
    assert find_length(lambda length: math.inf, 1.0) <= 2.0 * FIRST_LENGTH / 2**DOUBLINGS


def test_a_step_too_long_for_the_models_numbers_is_only_too_long(monkeypatch):
    real, overflown = path_step.sample_losses, []

    def overflowing(*given):
        found = real(*given)
        beyond = found > start + 2.0 * RISE  # of the largest of all samples
        overflown.append(bool(beyond.any()))
        return found.masked_fill(beyond, math.nan)

    start = max(float(real(wide("llama"), collate(FORGET, [i]), "mean")) for i in range(len(FORGET)))
    monkeypatch.setattr(path_step, "sample_losses", overflowing)
    found = ranked(wide("llama"), granularity="element")
    assert any(overflown)
    assert found.record["path"] == by_weight("llama").record["path"] and found.scores == by_weight("llama").scores


def test_weights_come_back_from_a_step_that_fails():
    weight = nn.Parameter(torch.tensor([1.0, 1e-9, 3.0]))
    before, step = weight.detach().clone(), SignStep({"w": weight}, {"w": torch.tensor([-2.0, 0.5, 0.0])})
    with pytest.raises(ZeroDivisionError), step.at(0.25):
        assert weight.tolist() == [0.75, 0.25, 3.0]
        raise ZeroDivisionError
    assert torch.equal(weight, before) and step.signs["w"].tolist() == [-1, 1, 0]
