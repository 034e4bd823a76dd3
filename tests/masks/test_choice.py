"""Which units a choice takes, counted by hand and against a plain loop."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fillm.errors import UsageError
from fillm.masks import chosen_units, make_choice, parse_select


def taken(sizes, unused=(), scores=None, kinds=None, ascending=False, **choice) -> list[int]:
    """Numbers of the chosen units, from 0."""
    flags = np.isin(np.arange(len(sizes)), unused)
    falling = np.arange(len(sizes), 0, -1.0) if scores is None else np.array(scores, dtype=float)
    named = ["mlp"] * len(sizes) if kinds is None else kinds
    found = chosen_units(make_choice(**choice), np.array(sizes), flags, falling, named, ascending)
    return found.nonzero()[0].tolist()


SIZES = [10, 40, 20, 20, 10]  # 100 weights


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"fraction": 0.5}, [0, 1]),
        ({"fraction": 0.49}, [0]),  # what does not fit ends it: the third would
        ({"fraction": 0.05}, [0]),  # one at least
        ({"fraction": 1.0}, [0, 1, 2, 3, 4]),
        ({"fraction": 0.3, "side": "bottom"}, [3, 4]),
        ({"fraction": 0.31, "side": "bottom"}, [3, 4]),
        ({"fraction": 0.01, "side": "bottom"}, [4]),
        ({"fraction": 0.4, "of": "tensors"}, [0, 1]),
        ({"fraction": 0.39, "of": "tensors"}, [0]),
        ({"fraction": 0.4, "of": "tensors", "side": "bottom"}, [3, 4]),
        ({"band": (0.1, 0.5)}, [1]),
        ({"band": (0.1, 0.71)}, [1, 2]),
        ({"band": (0.1, 0.2)}, [1]),
        ({"band": (0.0, 0.5)}, [0, 1]),
        ({"band": (0.2, 0.6), "of": "tensors"}, [1, 2]),
        ({"above": 2.0}, [0, 1, 2]),
        ({}, [0]),
    ],
)
def test_budgets_by_hand(choice, expected):
    assert taken(SIZES, **choice) == expected


def test_a_first_unit_that_is_larger_than_the_budget_is_taken_alone():
    assert taken([60, 10, 30], fraction=0.2) == [0] and taken([30, 10, 60], fraction=0.2, side="bottom") == [2]


def test_fractions_are_what_is_written():
    """0.29 of 100 is 29, though the nearest binary number is a little less."""
    assert 0.29 * 100 < 29
    assert len(taken([1] * 100, fraction=0.29)) == 29 and len(taken([1] * 1000, fraction=0.007)) == 7
    assert make_choice(fraction=0.1).end == Fraction(1, 10)


def test_unused_units_are_taken_from_the_end_alone():
    assert taken(SIZES, unused=[3, 4], fraction=1.0) == [0, 1, 2]
    assert taken(SIZES, unused=[3, 4], fraction=0.1, side="bottom") == [4]
    assert taken(SIZES, unused=[3, 4], band=(0.1, 1.0)) == [1, 2]
    assert taken(SIZES, unused=[3, 4], above=-1.0) == [0, 1, 2]
    for choice in ({"fraction": 0.5}, {"band": (0.1, 0.5)}, {"above": -1.0}):
        with pytest.raises(UsageError, match="selects nothing of 2 units, 2 of them unused"):
            taken([1, 1], unused=[0, 1], **choice)


def test_above_is_what_stands_higher_in_the_ranking():
    assert taken([1] * 4, scores=[3, 2, 2, 1], above=2) == [0]
    assert taken([1] * 4, scores=[1, 2, 2, np.inf], above=2, ascending=True) == [0]
    with pytest.raises(UsageError, match="select above:3.0: selects nothing of 4 units"):
        taken([1] * 4, scores=[3, 2, 2, 1], above=3)


def test_proportional_takes_the_same_part_of_every_kind():
    kinds = ["attn", "mlp", "mlp", "norm", "attn", "mlp", "attn", "mlp"]
    sizes = [10, 20, 20, 5, 10, 20, 20, 20]
    assert taken(sizes, kinds=kinds, fraction=0.5, proportional=True) == [0, 1, 2, 3, 4]
    assert taken(sizes, kinds=kinds, fraction=0.5, of="tensors", proportional=True) == [0, 1, 2, 3]
    assert taken(sizes, kinds=kinds, fraction=0.5, side="bottom", proportional=True) == [3, 5, 6, 7]
    assert taken(sizes, kinds=kinds, unused=[3], fraction=0.5, proportional=True) == [0, 1, 2, 4]


orders = st.lists(st.tuples(st.integers(1, 20), st.sampled_from(["mlp", "attn"])), min_size=1, max_size=20)
hundredths = st.integers(1, 100)


@settings(max_examples=100, deadline=None)
@given(
    orders, hundredths, st.sampled_from(["parameters", "tensors"]), st.sampled_from(["top", "bottom"]), st.booleans()
)
def test_a_budget_is_kept_and_no_more_would_fit(order, percent, of, side, proportional):
    sizes, kinds = [size for size, _ in order], [kind for _, kind in order]
    found = taken(sizes, kinds=kinds, fraction=percent / 100, of=of, side=side, proportional=proportional)
    for kind in set(kinds) if proportional else [None]:
        group = [i for i in range(len(sizes)) if kind in (None, kinds[i])]
        group = group if side == "top" else group[::-1]
        measure = {i: sizes[i] if of == "parameters" else 1 for i in group}
        spent, expected = 0, []
        for i in group:
            spent += measure[i]
            if expected and 100 * spent > percent * sum(measure.values()):
                break
            expected.append(i)
            if 100 * spent > percent * sum(measure.values()):
                break
        assert [i for i in found if i in measure] == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(orders, st.tuples(hundredths, hundredths).filter(lambda pair: pair[0] < pair[1]))
def test_a_band_begins_where_the_top_before_it_ends(order, band):
    sizes = [size for size, _ in order]
    low, high = (percent / 100 for percent in band)
    before, whole, found = (taken(sizes, **c) for c in ({"fraction": low}, {"fraction": high}, {"band": (low, high)}))
    if sizes[0] <= low * sum(sizes) and len(whole) > len(before):
        assert found == whole[len(before) :]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("top:0.1", {"side": "top", "fraction": 0.1}),
        ("bottom:0.25:tensors", {"side": "bottom", "fraction": 0.25, "of": "tensors"}),
        ("top:.1:parameters:proportional", {"side": "top", "fraction": 0.1, "of": "parameters", "proportional": True}),
        ("top:1e-3:proportional", {"side": "top", "fraction": 0.001, "proportional": True}),
        ("band:0.1-0.3", {"band": (0.1, 0.3)}),
        ("band:1e-3-1:tensors:proportional", {"band": (0.001, 1.0), "of": "tensors", "proportional": True}),
        ("above:0.5", {"above": 0.5}),
        ("above:-1e-7", {"above": -1e-7}),
    ],
)
def test_texts_and_arguments_say_the_same(text, arguments):
    assert parse_select(text) == arguments
    choice = make_choice(**arguments)
    assert make_choice(**parse_select(choice.text)) == choice


@pytest.mark.parametrize(
    "text",
    ["", "top", "top:", "top:x", "top:0.1:rows", "top:0.1:proportional:tensors", "side:0.1", "band:0.1", "above:",
     "band:0.1-0.2-0.3", "above:0.5:tensors", "top:0.1:tensors:proportional:more", "band:-0.1-0.3", "0.1"],
)  # fmt: skip
def test_other_texts_are_refused_with_what_may_stand_there(text):
    with pytest.raises(UsageError, match=r"^--select .*give top:FRACTION"):
        parse_select(text)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"fraction": 0.0}, "fraction=0.0 must be above 0"),
        ({"fraction": 1.01}, "1 at most"),
        ({"fraction": float("nan")}, "fraction=nan is no number"),
        ({"fraction": "0.1"}, "fraction='0.1' is no number"),
        ({"side": "middle"}, "side='middle' is none of top, bottom"),
        ({"of": "rows"}, "of='rows' is none of parameters, tensors"),
        ({"band": (0.3, 0.1)}, "band=0.3-0.1 must rise"),
        ({"band": (0.1, 1.5)}, "1 at most"),
        ({"above": float("inf")}, "must be finite"),
        ({"above": 1.0, "of": "tensors"}, "of and proportional have no effect beside above"),
        ({"above": 1.0, "band": (0, 1)}, "above has no effect beside band"),
        ({"band": (0, 1), "fraction": 0.1}, "fraction has no effect beside band"),
        ({"above": 1.0, "side": "top"}, "side has no effect beside above"),
    ],
)
def test_choices_that_cannot_be_are_refused(choice, complaint):
    with pytest.raises(UsageError, match=complaint):
        make_choice(**choice)


def test_a_fraction_out_of_bounds_is_refused_in_the_words_of_the_command():
    with pytest.raises(UsageError, match=r"^--select top:2: fraction=2.0 must be above 0"):
        parse_select("top:2")
