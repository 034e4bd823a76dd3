"""Some rows of every sample's gradient, formed for a moment; gradients rebuilt from other factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fillm.capture.gradients import padded_rows, row_layout
from tests.capture.per_sample_cases import BATCH, CASES, LENGTHS, Case, offsets_of, outer


def as_matrices(case: Case, values: Tensor) -> Tensor:
    """[B, *shape] -> [B, rows, columns], by the words of `row_layout`."""
    shape = case.gradients.shape
    return values.reshape(BATCH, -1, shape[-1] if len(shape) > 1 else 1)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=20, deadline=None)
@given(ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_leading_rows(name: str, ends: tuple[float, float]) -> None:
    case = CASES[name](0)
    rows, columns = row_layout(case.gradients.shape)
    assert (rows, columns) == as_matrices(case, case.dense).shape[1:]
    begin, end = sorted(round(fraction * rows) for fraction in ends)
    found = case.gradients.leading_rows(begin, end)
    assert found.shape == (BATCH, end - begin, columns)
    assert found.dtype == (torch.float64 if "float64" in name else torch.float32)
    difference = (found.double() - as_matrices(case, case.dense)[:, begin:end]).abs()
    assert bool((difference <= as_matrices(case, case.bound)[:, begin:end]).all())


@pytest.mark.parametrize("name", CASES)
def test_what_is_formed_can_be_changed_without_changing_the_gradients(name: str) -> None:
    case = CASES[name](1)
    rows = row_layout(case.gradients.shape)[0]
    before = case.gradients.leading_rows(0, rows)
    case.gradients.leading_rows(0, rows).fill_(7.0)
    assert torch.equal(case.gradients.leading_rows(0, rows), before)


@pytest.mark.parametrize("name", CASES)
def test_gradients_from_changed_factors(name: str) -> None:
    case, held = CASES[name](2), []

    def doubled(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor * 2 if tensor.is_floating_point() else tensor.clone()

    changed = case.gradients.with_factors(doubled)
    assert type(changed) is type(case.gradients) and changed.shape == case.gradients.shape and held
    copied = case.gradients.with_factors(torch.clone)
    for tensor in held:
        tensor.zero_()
    rows = row_layout(changed.shape)[0]
    assert not case.gradients.leading_rows(0, rows).any()  # everything that counts had come by
    found = copied.leading_rows(0, rows).double()
    assert bool(((found - as_matrices(case, case.dense)).abs() <= as_matrices(case, case.bound)).all())
    # One factor of a lookup and of what is held outright, two of an outer product: times 2, times 4.
    ratio = changed.squared_norms() / copied.squared_norms()
    if "tied" not in name and name != "summed":
        expected = 4.0 if "lookup" in name or held[0].shape[0] == BATCH else 16.0
        assert torch.allclose(ratio[copied.squared_norms() > 0], torch.tensor(expected).double(), rtol=1e-5)


def test_rows_are_padded_to_the_longest() -> None:
    rows = torch.arange(2.0 * sum(LENGTHS)).view(-1, 2)
    found = padded_rows(rows, offsets_of(LENGTHS))
    assert found.shape == (BATCH, max(LENGTHS), 2)
    start = 0
    for b, length in enumerate(LENGTHS):
        assert torch.equal(found[b, :length], rows[start : start + length]) and not found[b, length:].any()
        start += length


def test_padding_takes_nothing_from_rows_that_are_not_finite() -> None:
    rows = torch.full((3, 2), float("nan"))
    found = padded_rows(rows, torch.tensor([0, 0, 1, 3]))
    assert not found[0].any() and found[1, 0].isnan().all() and not found[1, 1].any() and found[2].isnan().all()


def test_rows_of_equal_number_are_not_copied() -> None:
    rows = torch.ones(6, 2)
    assert padded_rows(rows, torch.tensor([0, 3, 6])).data_ptr() == rows.data_ptr()
    assert padded_rows(rows[:0], torch.tensor([0, 0, 0])).shape == (2, 0, 2)
    assert padded_rows(rows[:0], torch.tensor([0])).shape == (0, 0, 2)


def test_products_of_padded_rows_are_the_gradients() -> None:
    """What a GPU does in one launch."""
    case = outer(seed=5)
    dy, x = (padded_rows(t, case.gradients.offsets) for t in (case.gradients.dy, case.gradients.x))
    difference = (dy.transpose(1, 2) @ x - case.dense).abs()
    assert bool((difference <= case.bound).all())
