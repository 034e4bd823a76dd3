"""Rounds of the path ranking against each round written out in float64 autograd, and the order that they are put in."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank import Ranking
from fillm.rank.path_rounds import Rounds, kept_after
from tests.families import build_family
from tests.rank.direct import FORGET, RETAIN
from tests.rank.test_path import FAMILIES, POINTS, RISE, RTOL, WEIGHT, Line, ranked, wide

ROUNDS, KEEP = 3, 0.1


@cache
def in_rounds(name: str) -> Ranking:
    return ranked(wide(name), granularity="element", path_rounds=ROUNDS, path_keep=KEEP)


def of_all(ranking: Ranking, names: list[str]) -> Tensor:
    return torch.cat([ranking.updates[f"scores/{name}"].flatten() for name in names])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_round_follows_what_the_round_before_kept(name):
    ranking, line = in_rounds(name), Line(wide(name), [tensor for tensor, _ in wide(name).named_parameters()])
    found, quiet = of_all(ranking, line.names), torch.cat([part.flatten() for part in line.quiet])
    sizes, place = [sign.numel() for sign in line.signs], torch.argsort(found, descending=True, stable=True)
    rounds = ranking.record["path"]["rounds"]
    assert len(rounds) == ROUNDS and ranking.record["path"]["length"] == rounds[-1]["length"]
    moved = torch.cat([sign.flatten() for sign in line.signs]) != 0
    for number, record in enumerate(rounds, 1):
        assert record["weights_moved"] == pytest.approx(int(moved.sum()), abs=int(quiet.sum()))
        length = record["length"]
        assert record["forget_rise"] == pytest.approx(line.at(length, FORGET)[0] - line.at(0.0, FORGET)[0], abs=1e-6)
        assert record["forget_rise"] >= RISE
        gain, damage = (line.contributions(length, POINTS, samples) for samples in (FORGET, RETAIN))
        score = torch.cat([(gain[tensor] - WEIGHT * damage[tensor]).flatten() for tensor in line.names])
        tolerance = RTOL * float(score.abs().max())
        kept = place[: int(kept_after(number, ROUNDS, KEEP) * len(found))] if number < ROUNDS else place[:0]
        stays = torch.zeros_like(moved).index_fill_(0, kept, True)
        assert bool((~stays | moved).all())  # nothing comes back
        left = moved & ~stays & ~quiet
        if number < ROUNDS:
            assert float(score[stays].min()) >= float(score[left].max()) - tolerance
        # What is left out keeps its order: scores are this round's, all lowered by the same.
        lowered = (score - found)[left]
        assert float(lowered.min()) >= -tolerance and float(lowered.max() - lowered.min()) <= 3 * tolerance
        moved = stays
        kept_signs = [part.view_as(sign) for part, sign in zip(stays.split(sizes), line.signs, strict=True)]
        line.signs = [sign * part for sign, part in zip(line.signs, kept_signs, strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_round_goes_further_with_fewer_weights(name):
    rounds = in_rounds(name).record["path"]["rounds"]
    lengths = [record["length"] for record in rounds]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    moved = [record["weights_moved"] for record in rounds]
    total = sum(row["numel"] for row in in_rounds(name))
    assert moved[1:] == [int(kept_after(number, ROUNDS, KEEP) * total) for number in (1, 2)]


def test_the_tables_rows_are_what_the_last_round_moved():
    ranking = in_rounds("llama")
    last = ranking.record["path"]
    assert sum(row["predicted_forget_gain"] for row in ranking) == pytest.approx(last["forget_contributions"])
    assert sum(row["retain_damage"] for row in ranking) == pytest.approx(last["retain_contributions"])
    one = ranked(wide("llama"), granularity="element")
    unused = [{row["name"] for row in some if row["note"] == "unused"} for some in (ranking, one)]
    assert unused[0] == unused[1]  # a tensor that is left out is none that no gradient reaches


def test_one_round_is_the_ranking_without_rounds():
    one = ranked(wide("llama"), granularity="element", path_rounds=1)
    assert "rounds" not in one.record["path"]
    both = [ranked(wide("llama"), granularity="element", path_rounds=count) for count in (2, 2)]
    for name, score in both[0].updates.items():
        assert torch.equal(score, both[1].updates[name])
    best = int(kept_after(1, 2, 0.1) * sum(score.numel() for score in one.updates.values()))
    masks = [some.select(best / sum(score.numel() for score in one.updates.values())) for some in (one, both[0])]
    assert masks[0].count == masks[1].count == pytest.approx(best, abs=1)
    for name in masks[0]:
        assert torch.equal(masks[0][name].to_bool(), masks[1][name].to_bool()), name


def test_the_model_comes_back_to_the_bit():
    model: nn.Module = build_family("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranked(model, granularity="element", path_rounds=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_cannot_forget_enough_are_one_line():
    model = build_family("llama")
    line = r"--path-rise \S+: round 1 of 2, along the sign of its gradient the forget loss rises by \S+ at most"
    with pytest.raises(UsageError, match=line):
        ranked(model, granularity="element", path_rise=1e6, include="model.norm.weight", path_rounds=2)


SHAPES = {"a": (3, 4), "b": (5,)}
INFOS = [TensorInfo(name, "mlp", 0, math.prod(shape), shape, (), 0, False, "m") for name, shape in SHAPES.items()]
NUMBERS = st.lists(st.integers(-40, 40), min_size=17, max_size=17)


def split(values: list[float], dtype: torch.dtype) -> dict[str, Tensor]:
    flat = torch.tensor(values, dtype=dtype)
    return {"a": flat[:12].view(3, 4).clone(), "b": flat[12:].clone()}


@given(first=NUMBERS, second=NUMBERS, still=st.sets(st.integers(0, 16), max_size=5), wide=st.booleans())
def test_what_goes_on_stands_before_what_is_left_out(first, second, still, wide):
    dtype = torch.float64 if wide else torch.float32
    signs = split([0 if i in still else 1 for i in range(17)], torch.int8)
    rounds = Rounds(INFOS, signs, count=2, keep=0.25)

    def scores(values: list[int]) -> dict[str, Tensor]:
        found = split([value / 7 for value in values], dtype)
        return {name: score.masked_fill(signs[name] == 0, -math.inf) for name, score in found.items()}

    before = scores(first)
    kept = rounds.leave_out(before)
    assert kept == min(8, 17 - len(still)) == sum(int((sign != 0).sum()) for sign in signs.values())  # half of 17
    moves = torch.cat([signs[name].flatten() != 0 for name in signs])
    flat = torch.cat([before[name].flatten() for name in before])
    order = torch.argsort(flat, descending=True, stable=True)
    assert set(order[:kept].tolist()) == set(moves.nonzero().flatten().tolist())
    last = scores(second)
    own = torch.cat([last[name].flatten() for name in last])
    found = torch.cat([score.flatten() for score in rounds.in_one_order(last).values()])
    assert torch.equal(found[moves], own[moves])
    left = torch.tensor([i not in still for i in range(17)]) & ~moves
    assert bool((found[~moves & ~left] == -math.inf).all())
    if bool(left.any()):
        assert bool(found[left].isfinite().all()) and float(found[left].max()) < float(found[moves].min())
        steps = flat[left][:, None] - flat[left][None, :]
        assert torch.allclose(found[left][:, None] - found[left][None, :], steps, atol=1e-5)


def test_parts_that_are_kept_have_equal_ratios():
    assert [kept_after(done, 4, 0.0625) for done in range(5)] == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625])
