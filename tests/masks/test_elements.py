"""Masks of single weights, streamed, beside a sort of all scores by (score, tensor, index)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fillm.errors import NumericsError, UsageError
from fillm.masks import ScoredTensor, element_masks, make_choice

SHAPES = {"a": (5, 7), "b": (33,), "c": (2, 3, 8), "d": (1, 1)}
KINDS = {"a": "mlp", "b": "norm", "c": "mlp", "d": "norm"}
TENSORS = [ScoredTensor(name, KINDS[name], shape) for name, shape in SHAPES.items()]


class Held:
    """Scores in memory, given in pieces of 16."""

    def __init__(self, scores: dict[str, Tensor], ascending: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.scores, self.ascending, self.dtype = scores, ascending, dtype
        self.unused = math.inf if ascending else 0.0
        self.reads = 0

    def pieces(self, name: str):
        self.reads += name == "a"
        return self.scores[name].to(self.dtype).flatten().split(16)


def ordered(scores: dict[str, Tensor], names, ascending: bool) -> list[tuple[str, int]]:
    """(tensor, flat index) of all weights, best first."""
    sign = 1.0 if ascending else -1.0
    entries = [(sign * value, name, i) for name in names for i, value in enumerate(scores[name].flatten().tolist())]
    return [(name, i) for _, name, i in sorted(entries)]


def expected(scores: dict[str, Tensor], ascending=False, fraction=None, side="top", band=None, proportional=False):
    """The same choice from whole sorted lists."""
    unused = math.inf if ascending else 0.0
    groups = [[n for n in SHAPES if KINDS[n] == kind] for kind in ("mlp", "norm")] if proportional else [list(SHAPES)]
    chosen = {name: torch.zeros(math.prod(shape), dtype=torch.bool) for name, shape in SHAPES.items()}
    for names in groups:
        order = ordered(scores, names, ascending)
        low, high = (0, fraction) if band is None else band
        begin, end = (round(1000 * place) * len(order) // 1000 for place in (low, high))
        end = max(end, begin + 1)
        part = order[len(order) - end :] if side == "bottom" else order[begin:end]
        for name, i in part:
            chosen[name][i] = side == "bottom" or float(scores[name].flatten()[i]) != unused
    return {name: flags.view(SHAPES[name]) for name, flags in chosen.items()}


def drawn(seed: int, values: int, ascending: bool = False) -> dict[str, Tensor]:
    """Scores with few different values, unused ones among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.randint(values, s, generator=generator).float() for n, s in SHAPES.items()}
    return {n: torch.where(s == 0, math.inf, s - 3.0) for n, s in scores.items()} if ascending else scores


def assert_same(masks, want: dict[str, Tensor]) -> None:
    assert list(masks) == [name for name in masks if want[name].any()]
    for name, flags in want.items():
        found = masks[name].to_bool() if name in masks else torch.zeros(SHAPES[name], dtype=torch.bool)
        assert torch.equal(found, flags), name


thousandths = st.integers(1, 1000).map(lambda n: n / 1000)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([2, 5, 1000]), st.booleans(), st.booleans(), st.data(),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_any_choice_is_that_of_a_sort(seed, values, ascending, proportional, data, dtype):
    scores = drawn(seed, values, ascending)
    if data.draw(st.booleans()):
        low, high = data.draw(st.tuples(thousandths, thousandths).filter(lambda pair: pair[0] < pair[1]))
        choice = {"band": (low, high), "proportional": proportional}
    else:
        choice = {"fraction": data.draw(thousandths), "side": data.draw(st.sampled_from(["top", "bottom"]))}
        choice["proportional"] = proportional
    want = expected(scores, ascending, **choice)
    held = Held(scores, ascending, dtype)
    before = {name: tensor.clone() for name, tensor in scores.items()}
    if any(flags.any() for flags in want.values()):
        assert_same(element_masks(make_choice(**choice), TENSORS, held), want)
    else:
        with pytest.raises(UsageError, match=r"selects none of 117 weights"):
            element_masks(make_choice(**choice), TENSORS, held)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("above", [-1.5, 0.0, 1.0, 1.5])
def test_above_a_score(ascending, above):
    scores = drawn(4, 9, ascending)
    better = {n: s < above if ascending else (s > above) & (s != 0) for n, s in scores.items()}
    held = Held(scores, ascending)
    assert_same(element_masks(make_choice(above=above), TENSORS, held), better)
    assert held.reads == 1


def test_a_score_that_the_type_does_not_hold_lies_between_its_neighbours():
    nearest = float(torch.tensor(0.1))  # above 0.1
    scores = {name: torch.full(shape, nearest) for name, shape in SHAPES.items()}
    assert len(element_masks(make_choice(above=0.1), TENSORS, Held(scores))) == 4
    with pytest.raises(UsageError, match="above:0.10000000149011612: selects none"):
        element_masks(make_choice(above=nearest), TENSORS, Held(scores))
    negative = {name: -tensor for name, tensor in scores.items()}
    assert len(element_masks(make_choice(above=-0.1), TENSORS, Held(negative, ascending=True))) == 4


def test_float32_takes_three_reads_and_float64_five():
    for dtype, reads in ((torch.float32, 3), (torch.float64, 5)):
        held = Held(drawn(1, 100), dtype=dtype)
        element_masks(make_choice(fraction=0.3), TENSORS, held)
        assert held.reads == reads


def test_infinite_scores_come_first_and_whole_tensors_become_whole():
    scores = drawn(2, 5)
    scores["c"] = torch.full(SHAPES["c"], math.inf)
    masks = element_masks(make_choice(fraction=48 / 117 + 1e-6), TENSORS, Held(scores))
    assert {name: mask.form for name, mask in masks.items()} == {"c": "whole"}


def test_nan_is_refused_by_the_tensor_that_holds_it():
    scores = drawn(2, 5)
    scores["c"][1, 2, 3] = math.nan
    for choice in ({"fraction": 0.1}, {"above": 1.0}, {"fraction": 1.0, "side": "bottom"}):
        with pytest.raises(NumericsError, match="score of a weight of c is NaN"):
            element_masks(make_choice(**choice), TENSORS, Held(scores))
