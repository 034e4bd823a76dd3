"""One call of one op, what it must agree with, and what it costs: what `python -m benchmarks.gpu` checks and times."""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import fillm_kernels as fk
import torch
from fillm_kernels import dispatch
from torch import Tensor

Given = dict[str, Any]
# Sums of n terms of either sign err by about sqrt(n) 2^-24 of their norm in float32, however narrow the inputs, since
# products of bfloat16 or float16 numbers are exact there: 2e-5 at the 65536 terms of the longest sum here. A product
# rounded to a narrower type shows at 2^-12 and above, a wrong index at 1.
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Call:
    """One op on one kind of argument.

    Attributes:
        op: its name.
        label: kind, sizes and element type.
        dtype: element type of the inputs.
        inputs: makes fresh random arguments, by name.
        run: the op; returns what is compared, and may write to arguments named in `written`.
        written: arguments the op writes to.
    """

    op: str
    label: str
    dtype: torch.dtype
    inputs: Callable[[], Given]
    run: Callable[..., Any]
    written: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Beside:
    """A call of torch that does the same, or the same number of products.

    Attributes:
        name: what it is.
        call: takes the op's arguments.
        target: its time over the op's time that docs/kernels.md aims at; None where it aims at nothing.
    """

    name: str
    call: Callable[[Given], Any]
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case(Call):
    """A call to be timed.

    Attributes:
        flop: floating-point operations that the op's algorithm needs.
        bytes: bytes that must move: each input read once, each output written once.
        target: fraction of the floor that docs/kernels.md aims at; None where it aims at nothing.
        beside: torch's calls to compare with.
        spot: runs the op on arguments of full size and compares a part that is cheap in float64; the relative error.
        allowed: what that error may be.
    """

    flop: float
    bytes: float
    target: float | None = None
    beside: tuple[Beside, ...] = ()
    spot: Callable[[Given], float]
    allowed: float = TOLERANCE


def registered(op: str) -> str:
    """The op whose backends run `op`: `outer_sketch` is `sample_moments` with the sketch alone."""
    return "sample_moments" if op == "outer_sketch" else op


def backend_of(op: str, device: torch.device) -> dict[str, str]:
    """Which backend runs an op on a device, and why another one was refused there, in words with the figures."""
    found = dispatch.backends()[registered(op)]
    # That a backend is one of other devices is no refusal.
    mine = {name: why for name, why in found["refused"].items() if not why.startswith("runs on")}
    refused = "; ".join(f"{name}: {reason}" for name, reason in mine.items())
    return {"backend": found["used"].get(device.type, "reference"), "refused": refused}


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)] if isinstance(result, list | tuple) else []


def reference(call: Callable[[], Any]) -> Any:
    """What a call gives on the float64 reference of every op."""
    with mock.patch.dict(os.environ, {dispatch.VARIABLE: "reference"}):
        return call()


def relative(got: Tensor, want: Tensor) -> float:
    """`|got - want| / |want|`; 0 for the same values, infinity for whole numbers that differ, NaN if there is one."""
    if torch.equal(got, want):
        return 0.0
    if not want.is_floating_point():
        return float("inf")
    wide = want.double()
    return float((got.double() - wide).norm() / wide.norm().clamp(min=1e-300))


def excess_of(call: Call, given: Given | None = None) -> tuple[float, float]:
    """Compares a call with the float64 reference on the same arguments, fresh ones if none are given.

    Returns:
        The relative error of that tensor, returned or written, which is worst for what it may be, and what it may be:
        `TOLERANCE`, or a unit in the last place of a narrower type it is stored in.
    """
    given = call.inputs() if given is None else given
    wanted = deepcopy(given)
    got = [*tensors(call.run(**given)), *(t for name in call.written for t in tensors(given[name]))]
    want = tensors(reference(lambda: call.run(**wanted)))
    want += [t for name in call.written for t in tensors(wanted[name])]
    worst = (0.0, TOLERANCE)
    for a, b in zip(got, want, strict=True):
        allowed = max(TOLERANCE, torch.finfo(b.dtype).eps) if b.is_floating_point() else TOLERANCE
        error = relative(a, b)
        if not error / allowed <= worst[0] / worst[1]:  # NaN is worse than anything
            worst = (error, allowed)
            if error != error:
                break
    return worst


def random_layer(
    device: torch.device, dtype: torch.dtype, lengths: list[int], inputs: int, outputs: int
) -> dict[str, Tensor]:
    """Random `x` [N, I], `dy` [N, O] and `offsets` [B + 1] of samples of these lengths."""
    rows = sum(lengths)
    return {
        "x": torch.randn(rows, inputs, device=device).to(dtype),
        "dy": torch.randn(rows, outputs, device=device).to(dtype),
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
    }


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def random_selection(device: torch.device, count: int, density: float) -> fk.Selection:
    """A random mask of about `density` of `count` weights."""
    if density == 1.0:
        bits = torch.full(((count + 7) // 8,), 255, dtype=torch.uint8, device=device)
        if count % 8:
            bits[-1] = (1 << count % 8) - 1
        return fk.select_bits(bits, count)
    return fk.select_bits(fk.top_mask([torch.randn(count, device=device)], int(density * count)).bits[0], count)
