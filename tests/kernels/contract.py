"""What a contract of an op is, and what tests do with one: fresh arguments, other layouts, comparisons to the bit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fillm_kernels import dispatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Arguments = dict[str, Any]  # of the public function; lists of tensors among them


@dataclass(frozen=True)
class Shape:
    """Lengths of the samples of a layer, its inputs and its outputs; ops on other things make theirs from these."""

    lengths: Sequence[int]
    inputs: int
    outputs: int


SMALL = Shape((3, 0, 5), 6, 8)
# Empty samples and batches, one row, both sides of vector widths and tiles, primes, one long sample among short ones.
SHAPES = (
    SMALL,
    Shape((), 3, 2),
    Shape((0, 0), 5, 1),
    Shape((1,), 1, 1),
    Shape((63, 1, 2), 65, 7),
    Shape((131, 1, 1, 0), 63, 64),
    Shape((2, 64, 65), 64, 67),
)


@dataclass(frozen=True)
class Contract:
    """One way to call an op.

    Attributes:
        name: for the test's name.
        op: its name in the dispatch table.
        call: the public function.
        build: (shape, dtype) -> arguments by keyword.
        answer: arguments as they were before the call -> what `results` gives, float64.
        written: names of arguments that the op writes to.
        contiguous: names of arguments that must be contiguous.
        roundoff: what a number may be off, in roundings of the largest of its tensor.
        anything_goes: (argument, mistake) that is none for this op.
        thread_proof: whether the C++ backend promises the same bits for any number of threads.
        many_programs: whether Triton starts so many programs that its interpreter is given fewer shapes.
        not_on: backends of the op that leave this way of calling it to the next one.
    """

    name: str
    op: str
    call: Callable[..., Any]
    build: Callable[[Shape, torch.dtype], Arguments]
    answer: Callable[[Arguments], list[Tensor]]
    written: Sequence[str] = ()
    contiguous: Sequence[str] = ()
    roundoff: float = 0.0
    anything_goes: frozenset[tuple[str, str]] = field(default_factory=frozenset)
    thread_proof: bool = True
    many_programs: bool = False
    not_on: Sequence[str] = ()

    def backends(self) -> list[str]:
        """The op's backends that run this."""
        return [name for name in dispatch._registry[self.op] if name not in self.not_on]

    def results(self, arguments: Arguments) -> list[Tensor]:
        """What a call returns, and what it has written."""
        returned = self.call(**arguments)
        return flat(returned) + [tensor for name in self.written for tensor in flat(arguments[name])]


def flat(value: Any) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (list, tuple)) else []


def whole(*size: int, dtype: torch.dtype, low: int = -1, high: int = 1) -> Tensor:
    return torch.randint(low, high + 1, size).to(dtype)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_of(arguments: Arguments) -> Mapping[str, Tensor]:
    """Every tensor among the arguments, by a name such as `state[1]`."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": part for i, part in enumerate(value) if isinstance(part, Tensor)}
    return found


def changed(arguments: Arguments, change: Callable[[str, Tensor], Any]) -> Arguments:
    """The arguments with every tensor, in lists of lists too, replaced by change(name, tensor)."""

    def made(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value)
        if isinstance(value, (list, tuple)):
            return type(value)([made(f"{name}[{i}]", part) for i, part in enumerate(value)])
        return value

    return {name: made(name, value) for name, value in arguments.items()}


def force(contract: Contract, backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force a backend and return the device it runs on; skip, with its reason, what cannot run here."""
    entry = dispatch._registry[contract.op][backend]
    device = "cpu" if entry.refusal("cpu") is None else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{backend}: {entry.refusal('cpu')}, and there is no GPU")
    monkeypatch.setenv("FILLM_BACKEND", backend)
    return device


def takes(contract: Contract, backend: str, dtype: torch.dtype) -> bool:
    dtypes = dispatch._registry[contract.op][backend].dtypes
    return not dtypes or dtype in dtypes


def on(device: str, arguments: Arguments) -> Arguments:
    return changed(arguments, lambda _, tensor: tensor.to(device))


def copy(arguments: Arguments) -> Arguments:
    return changed(arguments, lambda _, tensor: tensor.clone())


def bits_of(tensor: Tensor) -> Tensor:
    """What equality to the bit compares: NaNs and the sign of zero included."""
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(bits_of(a), bits_of(b))


def assert_is(results: list[Tensor], answer: list[Tensor], contract: Contract) -> None:
    assert len(results) == len(answer)
    for got, want in zip(results, answer, strict=True):
        assert got.shape == want.shape
        if got.dtype.is_floating_point and contract.roundoff and want.numel():
            unit = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
            finite = want.isfinite()
            assert torch.equal(got.cpu().double()[~finite], want[~finite])
            off = (got.cpu().double() - want)[finite].abs()
            assert bool((off <= contract.roundoff * unit * want[finite].abs().max()).all()) if off.numel() else True
        else:
            assert torch.equal(got.cpu().double(), want)


def noise(arguments: Arguments) -> Arguments:
    """Numbers whose sums depend on their order, in the place of whole ones."""
    return changed(
        arguments, lambda _, t: t + torch.rand_like(t, dtype=torch.float32).to(t.dtype) if t.is_floating_point() else t
    )


def strided(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers with gaps between columns and rows, in a room full of NaN: (room, view)."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return tensor, tensor
    fill = torch.nan if tensor.is_floating_point() else 77
    room = torch.full((*(2 * size + 3 for size in tensor.shape),), fill, dtype=tensor.dtype)
    view = room[tuple(slice(1, 2 * size + 1, 2) for size in tensor.shape)]
    view.copy_(tensor)
    return room, view


class Recorder(TorchDispatchMode):
    """Calls of registered ops, as (op, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "fillm_kernels":
            assert not kwargs
            self.calls.append((op, changed({"all": list(args)}, lambda _, t: t.clone())["all"]))
        return op(*args, **(kwargs or {}))
