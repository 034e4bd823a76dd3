"""What every op does with arguments of other kinds, and with wrong ones; the table is contracts.py."""

import itertools
from typing import Any

import fillm_kernels
import numpy as np
import pytest
import torch
from fillm_kernels import DeviceError, DtypeError, KernelError, ShapeError
from torch import Tensor

from tests.kernels.contract import SMALL, assert_is, assert_same_bits, changed, copy, flat, noise, tensors_of
from tests.kernels.contracts import CONTRACTS

every_contract = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)


class Foreign:
    """An array of another library: nothing but the protocol."""

    def __init__(self, tensor: Tensor | np.ndarray) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._tensor.__dlpack_device__()


@every_contract
def test_numpy_arrays_and_dlpack_objects_are_read_and_written_where_they_are(contract):
    given = contract.build(SMALL, torch.float32)
    answer = contract.answer(given)
    for wrap in (lambda t: t.numpy(), Foreign):
        tensors = copy(given)
        returned = contract.call(**changed(tensors, lambda _, t, wrap=wrap: wrap(t)))
        written = [part for name in contract.written for part in flat(tensors[name])]
        assert_is(flat(returned) + written, answer, contract)
    for name in contract.written:
        for wrap, words in ((lambda array: array, "is read-only"), (Foreign, "Cannot export readonly")):
            locked = changed(copy(given), lambda _, t, wrap=wrap: wrap(read_only(t)))
            with pytest.raises(DtypeError, match=words):
                contract.call(**{**copy(given), name: locked[name]})


def read_only(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def test_arrays_of_another_byte_order_or_out_of_reach_are_named():
    x, offsets = np.ones((2, 3), np.float32), np.array([0, 2])

    class Elsewhere(Foreign):
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0  # DLPack's code of CUDA

    with pytest.raises(DtypeError, match="^dy is in the byte order of another machine"):
        fillm_kernels.ghost_norm(x, x.astype(x.dtype.newbyteorder()), offsets)
    with pytest.raises(DtypeError, match="^x: can't convert"):
        fillm_kernels.ghost_norm(x.astype(object), x, offsets)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="^x: "):
            fillm_kernels.ghost_norm(Elsewhere(x), x, offsets)


MISTAKES = {
    "dtype": (lambda t: t.to(torch.complex64), DtypeError),
    "whole": (lambda t: t.to(torch.int16), DtypeError),
    "dims": (lambda t: t[None], ShapeError),
    "scalar": (lambda t: t.flatten()[0], ShapeError),
    "longer": (lambda t: torch.cat([t, t[:1]]), ShapeError),
    "sparse": (lambda t: t.to_sparse(), DtypeError),
    "device": (lambda t: t.to("meta"), DeviceError),
    "list": (lambda t: t.tolist(), DtypeError),
}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@every_contract
def test_a_mistake_in_any_tensor_is_a_named_error_and_writes_nothing(contract, backend, monkeypatch):
    monkeypatch.setenv("FILLM_BACKEND", backend)
    given = contract.build(SMALL, torch.float32)
    names = list(tensors_of(given))
    for name, (mistake, (change, error)) in itertools.product(names, MISTAKES.items()):
        if (name, mistake) in contract.anything_goes or (mistake == "device" and len(names) == 1):
            continue
        bad = changed(copy(given), lambda n, t, name=name, change=change: change(t) if n == name else t)
        # Another dimension may make the dtype or the number of entries wrong first: any named error will do there.
        wanted = error if mistake in ("sparse", "device") else KernelError
        with pytest.raises(wanted):
            contract.call(**bad)
        for other, tensor in tensors_of(bad).items():
            if other != name:
                assert torch.equal(tensor, tensors_of(given)[other])


@every_contract
def test_a_mixture_of_float_types_is_refused_or_means_the_same(contract):
    given = contract.build(SMALL, torch.bfloat16)
    for name, tensor in tensors_of(given).items():
        if not tensor.is_floating_point():
            continue
        mixed = changed(copy(given), lambda n, t, name=name: t.double() if n == name else t)
        try:
            results = contract.results(mixed)
        except DtypeError:
            continue
        # What is taken is taken at its value: wider weights, norms, sums and gradients.
        assert_is(results, contract.answer(given), contract)


@every_contract
def test_gradients_asked_for_or_not_change_no_bit_and_never_come_out_wrong(contract):
    given = noise(contract.build(SMALL, torch.float32))
    want = contract.results(copy(given))
    leaves = [n for n, t in tensors_of(given).items() if t.is_floating_point()]

    def ask(name: str, tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_(name in leaves and name.split("[")[0] not in contract.written)

    results = contract.results(changed(given, ask))
    assert_same_bits([t.detach() for t in results], want)
    for tensor in results:
        if tensor.grad_fn is not None:  # refused, where a zero would be a wrong answer
            with pytest.raises(RuntimeError, match="no autograd formula"):
                tensor.sum().backward()
            break
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same_bits([t.clone() for t in contract.results(changed(given, ask))], want)
    with torch.inference_mode():
        inside = copy(given)
    assert_same_bits(contract.results(changed(inside, lambda _, t: t.clone())), want)


def test_numpy_numbers_are_whole_numbers_and_others_are_refused():
    x, dy, offsets = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2])
    four = np.int64(4)
    assert fillm_kernels.sketch(x, four, seed=four).shape == (2, 4)
    assert fillm_kernels.factored_sketch(x, dy, offsets, four).shape == (1, 16)
    assert fillm_kernels.soir_sweep(x, x[0], x[:, 0], 0.1, numel=four).score.ndim == 0
    assert int(fillm_kernels.top_mask([x], np.int64(2)).bits[0]) == 3
    for call, error in (
        (lambda: fillm_kernels.sketch(x, 4.0), DtypeError),
        (lambda: fillm_kernels.sketch(x, 4, seed=2**63), ShapeError),
        (lambda: fillm_kernels.sketch(x, 1 << 25, "sjlt", nonzeros=1 << 25), ShapeError),
        (lambda: fillm_kernels.outer_sketch(x, dy, offsets, 4.5), DtypeError),
        (lambda: fillm_kernels.factored_sketch(x, dy, offsets, (4.0, 4)), DtypeError),
        (lambda: fillm_kernels.factored_sketch(x, dy, offsets, 4, seed=2**63), ShapeError),
        (lambda: fillm_kernels.top_mask([x], 3.0), DtypeError),
        (lambda: fillm_kernels.soir_sweep(x, x[0], x[:, 0], 0.1, numel=2.5), DtypeError),
        (lambda: fillm_kernels.soir_sweep(x, x[0], x[:, 0], 0.1, v_norm=torch.ones(3)), ShapeError),
        (lambda: fillm_kernels.soir_sweep(x, x[0], x[:, 0], 0.1, v_norm=torch.ones(1, dtype=torch.int64)), DtypeError),
        (lambda: fillm_kernels.soir_sweep(x, x[0], x[:, 0], 0.1, v_norm="a"), DtypeError),
    ):
        with pytest.raises(error):
            call()


def test_what_is_written_may_share_memory_with_nothing():
    x, dy, offsets = torch.ones(5, 4), torch.ones(5, 3), torch.tensor([0, 2, 5])
    room = torch.zeros(3, 8)
    bits, state = torch.tensor([1], dtype=torch.uint8), torch.zeros(2, 1)
    w = torch.ones(6)
    for call, words in (
        (lambda: fillm_kernels.weighted_outer_(x[:3], x, dy, None, offsets), "out and x share memory"),
        (
            lambda: fillm_kernels.weighted_outer_(torch.zeros(9).as_strided((3, 4), (1, 1)), x, dy, None, offsets),
            "entries of out share memory",
        ),
        (
            lambda: fillm_kernels.sample_moments(x, dy, offsets, second=room[:, :4], absolute=room[:, 2:6]),
            "second and absolute share memory",
        ),
        (lambda: fillm_kernels.masked_adamw_(w, w, tuple(state), bits, step=1), r"param and grad share memory"),
        (
            lambda: fillm_kernels.masked_adamw_(w, w.clone(), (state[0], state[0]), bits, step=1),
            r"state\[0\] and state\[1\] share memory",
        ),
        (lambda: fillm_kernels.masked_sophia_(w, w.clone(), tuple(state) * 2, bits), "two tensors; got 4"),
        (
            lambda: fillm_kernels.masked_sophia_(w, w.clone(), tuple(state), bits, clip=torch.ones(2)),
            "clip must be one",
        ),
    ):
        with pytest.raises(ShapeError, match=words):
            call()
    assert not room.any() and not state.any() and bool((x == 1).all())
    # Views that lie between each other's entries are apart.
    fillm_kernels.sample_moments(x, dy, offsets, second=room[:, ::2], absolute=room[:, 1::2])
    assert bool((room[:, ::2] == 4 + 9).all()) and bool((room[:, 1::2] == 5).all())
