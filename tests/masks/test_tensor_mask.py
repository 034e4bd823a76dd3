"""One tensor's mask in its three forms: laws and conversions beside plain bool tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fillm.errors import UsageError
from fillm.masks import TensorMask, tensor_mask

SHAPES = [(), (1,), (13,), (64,), (1, 1), (3, 5), (8, 8), (5, 1), (7, 64), (2, 3, 5), (4, 3, 8), (0,), (0, 4), (3, 0)]


def drawn(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """A bool tensor of one of the kinds that have a form of their own."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "rows" and len(shape) > 1:
        flags = torch.rand(shape[0], generator=generator) < 0.5
        return flags.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    return torch.rand(shape, generator=generator) < 0.4


bools = st.tuples(st.sampled_from(["all", "none", "rows", "some"]), st.integers(0, 99))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=30, deadline=None)
@given(one=bools, two=bools)
def test_every_operation_is_that_of_bool_tensors(shape, one, two):
    a, b = drawn(shape, *one), drawn(shape, *two)
    mask, other = TensorMask.from_bool(a), TensorMask.from_bool(b)
    assert mask.shape == shape and mask.numel == a.numel()
    assert torch.equal(mask.to_bool(), a) and mask.to_bool().shape == shape
    assert mask.count == int(a.sum()) and bool(mask) == bool(a.any())
    assert mask.packed().numpy().tolist() == np.packbits(a.numpy(), bitorder="little").tolist()
    assert torch.equal(mask.combined(other, torch.bitwise_or).to_bool(), a | b)
    assert torch.equal(mask.combined(other, torch.bitwise_and).to_bool(), a & b)
    assert torch.equal(mask.complement().to_bool(), ~a)
    assert mask.complement().complement() == mask
    assert (mask == other) == bool((a == b).all())


@pytest.mark.parametrize("shape", [(5,), (6, 4), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", ["all", "rows", "some"])
def test_the_shortest_form_is_chosen_and_leads_to_the_same_selection(shape, kind):
    chosen = drawn(shape, kind, 1)
    mask = TensorMask.from_bool(chosen)
    expected = "bits" if kind == "rows" and len(shape) == 1 else {"all": "whole", "rows": "rows", "some": "bits"}[kind]
    assert mask.form == expected
    selection = mask.selection("cpu")
    assert selection.count == int(chosen.sum()) and selection.entries == chosen.numel()
    if expected == "rows":
        assert selection.rows.tolist() == chosen.flatten(1)[:, 0].nonzero().flatten().tolist()
    if expected == "whole":
        assert selection.rows.tolist() == list(range(shape[0]))


def test_a_scalar_is_selected_by_its_bit():
    selection = TensorMask(()).selection()
    assert (selection.count, selection.entries, selection.bits.tolist()) == (1, 1, [1])


def test_forms_of_the_same_weights_are_equal():
    bits = TensorMask((3, 4), bits=torch.tensor([0xF0, 0x0F], dtype=torch.uint8))
    rows = TensorMask((3, 4), rows=torch.tensor([1, 2]))
    assert bits == rows and TensorMask.from_bits((3, 4), bits.bits).form == "rows"
    assert rows != TensorMask((3, 4)) and rows != TensorMask((4, 3), rows=torch.tensor([1, 2])) and rows != "rows"
    assert TensorMask((5,), rows=torch.tensor([1, 3])) == TensorMask((5,), bits=torch.tensor([10], dtype=torch.uint8))


def test_rows_are_found_across_pieces(monkeypatch):
    monkeypatch.setattr(tensor_mask, "_PIECE_BYTES", 4)
    flags = torch.rand(61) < 0.5
    chosen = flags[:, None].expand(61, 7).clone()
    mask = TensorMask.from_bool(chosen)
    assert mask.form == "rows" and torch.equal(mask.to_bool(), chosen)
    chosen[60, 6] ^= True
    mask = TensorMask.from_bool(chosen)
    assert mask.form == "bits" and torch.equal(mask.to_bool(), chosen)


def test_a_view_is_read_in_flat_order_and_left_as_it_was():
    chosen = torch.rand(6, 4) < 0.5
    before = chosen.clone()
    for view in (chosen.T, chosen[::2, 1:], chosen[:1].expand(5, 4), chosen[0, 0]):
        assert torch.equal(TensorMask.from_bool(view).to_bool(), view)
    assert torch.equal(chosen, before)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rows": torch.tensor([0]), "bits": torch.zeros(2, dtype=torch.uint8)}, "rows or bits, not both"),
        ({"bits": torch.zeros(1, dtype=torch.uint8)}, r"its bits must be \[2\] of uint8, not \[1\]"),
        ({"bits": torch.zeros(2)}, "of torch.float32"),
        ({"bits": torch.tensor([0, 16], dtype=torch.uint8)}, "bits past weight 12 are not 0"),
        ({"rows": torch.tensor([0.0])}, r"must be \[R\] of int64"),
        ({"rows": torch.tensor([[0]])}, r"must be \[R\] of int64, not \[1, 1\]"),
        ({"rows": torch.tensor([1, 0])}, "must ascend without repeats from 0 to 2"),
        ({"rows": torch.tensor([1, 1])}, "must ascend"),
        ({"rows": torch.tensor([-1, 1])}, "must ascend"),
        ({"rows": torch.tensor([0, 3])}, "must ascend"),
    ],
)
def test_what_is_no_mask_of_the_tensor_is_refused(fields, complaint):
    with pytest.raises(UsageError, match=complaint):
        TensorMask((3, 4), **fields)
