"""One table of all ops: how each is called, and an answer in float64 that shares no code with it.

Arguments are small whole numbers and halves, chosen so that every product and sum is exact in float32 in whatever order
it is taken: where a contract's `roundoff` is 0 every backend, element type and memory layout must give the answer to
the bit. What takes a division, a logarithm or a transform states what it may lose.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fillm_kernels as fk
import torch
from torch import Tensor

from tests.kernels.law import projection, two_sided
from tests.kernels.ragged import gradients

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


def ragged(shape: Shape, dtype: torch.dtype) -> Arguments:
    rows = sum(shape.lengths)
    dy = whole(rows, shape.outputs, dtype=dtype)
    dy[torch.rand(rows) < 0.3] = 0
    offsets = torch.tensor([0, *shape.lengths]).cumsum(0)
    return {"x": whole(rows, shape.inputs, dtype=dtype), "dy": dy, "offsets": offsets}


def of(arguments: Arguments) -> Tensor:
    return gradients(arguments["x"], arguments["dy"], arguments["offsets"])


# ---- per-sample gradients ------------------------------------------------------------------------------------------


def norm_contract(form: str) -> Contract:
    return Contract(
        f"ghost_norm {form}", "ghost_norm", fk.ghost_norm,
        lambda shape, dtype: {**ragged(shape, dtype), "form": form},
        lambda a: [of(a).square().sum((1, 2))],
    )  # fmt: skip


def dot_contract(wide: bool) -> Contract:
    def build(shape: Shape, dtype: torch.dtype) -> Arguments:
        v = whole(shape.outputs, shape.inputs, dtype=wide_of(dtype) if wide else dtype, low=-2, high=2)
        return {**ragged(shape, dtype), "v": v}

    name = "ghost_dot of a wider v" if wide else "ghost_dot"
    return Contract(name, "ghost_dot", fk.ghost_dot, build, lambda a: [(of(a) * a["v"].double()).sum((1, 2))])


def gram_build(shape: Shape, dtype: torch.dtype) -> Arguments:
    first = ragged(shape, dtype)
    second = ragged(Shape((2, 0, 71, 1), shape.inputs, shape.outputs), dtype)
    return {f"{name}{side}": t for side, part in ((1, first), (2, second)) for name, t in part.items()}


def gram_answer(a: Arguments) -> list[Tensor]:
    one, other = (gradients(a[f"x{side}"], a[f"dy{side}"], a[f"offsets{side}"]) for side in (1, 2))
    return [torch.einsum("boi,coi->bc", one, other)]


def outer_contract(weighted: bool) -> Contract:
    def build(shape: Shape, dtype: torch.dtype) -> Arguments:
        weights = whole(len(shape.lengths), dtype=torch.float32, low=-2, high=2) / 2 if weighted else None
        out = whole(shape.outputs, shape.inputs, dtype=wide_of(dtype), low=-5, high=5)
        return {**ragged(shape, dtype), "out": out, "weights": weights, "alpha": 0.5}

    def answer(a: Arguments) -> list[Tensor]:
        weights = torch.ones(len(a["offsets"]) - 1) if a["weights"] is None else a["weights"]
        out = a["out"].double() + 0.5 * torch.einsum("b,boi->oi", weights.double(), of(a))
        return [out, out]

    name = "weighted_outer_" if weighted else "weighted_outer_ of plain sums"
    return Contract(name, "weighted_outer_", fk.weighted_outer_, build, answer, written=("out",))


def moments_build(shape: Shape, dtype: torch.dtype) -> Arguments:
    wide = wide_of(dtype)
    v, second, absolute = (whole(shape.outputs, shape.inputs, dtype=wide, low=-3, high=3) for _ in range(3))
    asked = {"rows": True, "alpha": 0.5, "sketch_dim": 16, "kind": "sjlt", "seed": 5}
    return {**ragged(shape, dtype), "v": v, "second": second, "absolute": absolute, **asked}


def moments_answer(a: Arguments) -> list[Tensor]:
    g = of(a)
    second = a["second"].double() + 0.5 * g.square().sum(0)
    absolute = a["absolute"].double() + 0.5 * g.abs().sum(0)
    sketch = g.flatten(1) @ projection("sjlt", 5, 16, g.shape[1] * g.shape[2])
    squares = g.square()
    return [squares.sum((1, 2)), (g * a["v"].double()).sum((1, 2)), squares.sum(2), sketch, second, absolute]


# ---- sketches --------------------------------------------------------------------------------------------------------

# An entry of a dense map is off by up to 16 roundings (test_seed_law.py), and so is a bin of a transform; some thousand
# terms of random sign add up to the root of that: 16 * 32 roundings of the largest number.
INEXACT = 512.0


def outer_sketch_contract(kind: str, dim: int) -> Contract:
    def answer(a: Arguments) -> list[Tensor]:
        g = of(a).flatten(1)
        return [g @ projection(kind, 2**40 + 3, dim, g.shape[1])]

    return Contract(
        f"outer_sketch {kind}", "sample_moments", fk.outer_sketch,
        lambda shape, dtype: {**ragged(shape, dtype), "dim": dim, "kind": kind, "seed": 2**40 + 3},
        answer, roundoff=INEXACT if kind == "gaussian" else 0.0, thread_proof=kind not in ("gaussian", "rademacher"),
        many_programs=True,
    )  # fmt: skip


def sketch_contract(kind: str, dim: int) -> Contract:
    def build(shape: Shape, dtype: torch.dtype) -> Arguments:
        g = whole(len(shape.lengths), shape.inputs * shape.outputs, dtype=dtype, low=-3, high=3)
        return {"g": g, "dim": dim, "kind": kind, "seed": 2**40 + 3, "offset": 2**33 + 7}

    def answer(a: Arguments) -> list[Tensor]:
        return [a["g"].double() @ projection(kind, a["seed"], dim, a["g"].shape[1], offset=a["offset"])]

    dense = kind in ("gaussian", "rademacher")
    return Contract(
        f"sketch {kind}", "sketch", fk.sketch, build, answer, roundoff=INEXACT if kind == "gaussian" else 0.0,
        anything_goes=frozenset({("g", "longer")}), thread_proof=not dense, many_programs=True,
    )  # fmt: skip


def factored_contract(kind: str, *dims: int) -> Contract:
    return Contract(
        f"factored_sketch {kind}", "factored_sketch", fk.factored_sketch,
        lambda shape, dtype: {**ragged(shape, dtype), "dims": dims, "kind": kind, "seed": 2**40 + 3},
        lambda a: [two_sided(kind, a["seed"], dims, of(a))],
        roundoff=0.0 if kind == "factored-sjlt" else INEXACT, thread_proof=False, many_programs=True,
    )  # fmt: skip


def sweep_build(shape: Shape, dtype: torch.dtype) -> Arguments:
    # lambda = 2 * 4 / 2 = 4 and q = 4, so that c = d / 8 is exact.
    n, k = sum(shape.lengths), shape.inputs * shape.outputs
    v = whole(2, k, dtype=wide_of(dtype), low=-2, high=2)
    norms = torch.full((2, n), 4.0, dtype=torch.float64)
    return {"s": whole(2, n, k, dtype=dtype), "v": v, "norms": norms, "damping": 2.0, "numel": [2, 2]}


def sweep_answer(a: Arguments) -> list[Tensor]:
    s, v = a["s"].double(), a["v"].double()
    n = s.shape[1]
    dots = torch.einsum("lnk,lk->ln", s, v)
    weighted = torch.einsum("ln,lnk->lk", dots / 8, s)
    if n == 0:  # no curvature at all: damping 0, and what v alone makes of it
        nothing = torch.zeros(2, dtype=torch.float64)
        infinite = torch.where(v.square().sum(1) == 0, 0.0, torch.inf)
        return [dots, weighted, nothing, nothing, infinite, infinite]
    u = (v - weighted / n) / 4
    damping = torch.full((2,), 4.0, dtype=torch.float64)
    cross = (dots / 8 * dots).sum(1) / n
    return [dots, weighted, damping, cross, u.square().sum(1).sqrt(), (v * u).sum(1)]


# ---- masks -----------------------------------------------------------------------------------------------------------


def top_build(shape: Shape, dtype: torch.dtype) -> Arguments:
    sizes = (sum(shape.lengths) * shape.inputs, 0, shape.outputs)
    scores = [whole(size, dtype=dtype, low=-40, high=40) / 4 for size in sizes]  # many ties
    return {"scores": scores, "budget": sum(sizes) // 3}


def top_answer(a: Arguments) -> list[Tensor]:
    joined = [float(value) for tensor in a["scores"] for value in tensor.flatten()]
    order = sorted(range(len(joined)), key=lambda i: (-joined[i], i))[: a["budget"]]
    bits, first = [], 0
    for tensor in a["scores"]:
        own = [0] * math.ceil(tensor.numel() / 8)
        for at in order:
            if first <= at < first + tensor.numel():
                own[(at - first) // 8] += 1 << (at - first) % 8
        bits.append(torch.tensor(own, dtype=torch.float64))
        first += tensor.numel()
    threshold = joined[order[-1]] if order else math.inf
    return [*bits, torch.tensor(threshold, dtype=torch.float64)]


def chosen_of(mask: Tensor, shape: torch.Size) -> Tensor:
    """Flat indices of a mask given as bits or as rows."""
    if mask.dtype == torch.uint8:
        return torch.tensor([i for i in range(math.prod(shape)) if int(mask[i // 8]) >> i % 8 & 1], dtype=torch.int64)
    columns = math.prod(shape[1:])
    return (mask[:, None] * columns + torch.arange(columns)).flatten()


def mask_of(rows: bool, shape: tuple[int, int]) -> Tensor:
    if rows:
        return (torch.rand(shape[0]) < 0.5).nonzero()[:, 0]
    bits = torch.randint(0, 256, ((math.prod(shape) + 7) // 8,), dtype=torch.uint8)
    if math.prod(shape) % 8:
        bits[-1] &= (1 << math.prod(shape) % 8) - 1
    return bits


def pick(choices: Sequence[float], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), tuple(size))].to(dtype)


def norm_build(shape: Shape, dtype: torch.dtype) -> Arguments:
    sizes = ((shape.outputs, shape.inputs), (shape.inputs, 3))
    grads = [whole(*size, dtype=dtype, low=-8, high=8) for size in sizes]
    return {"grads": grads, "masks": [mask_of(False, sizes[0]), mask_of(True, sizes[1])]}


def norm_answer(a: Arguments) -> list[Tensor]:
    parts = [g.flatten()[chosen_of(m, g.shape)].double() for g, m in zip(a["grads"], a["masks"], strict=True)]
    return [torch.cat(parts).square().sum().sqrt()]


def step_build(rows: bool, rule: str) -> Callable[[Shape, torch.dtype], Arguments]:
    """Roots of 1 and 49, divisors that are powers of two, factors that are halves and quarters."""

    def build(shape: Shape, dtype: torch.dtype) -> Arguments:
        size = (shape.outputs, shape.inputs)
        mask = mask_of(rows, size)
        count, wide = len(chosen_of(mask, torch.Size(size))), wide_of(dtype)
        param, grad = pick([-1, -0.5, 0, 0.5, 1], size, dtype), pick([-4, 4], size, dtype)
        first = pick([-2, 0, 2], [count], wide)
        arguments: Arguments = {"param": param, "grad": grad, "mask": mask, "clip": 0.5, "betas": (0.5, 0.75)}
        if rule == "adamw":
            state = (first, pick([0, 64], [count], wide))
            return {**arguments, "state": state, "step": 1, "lr": 0.25, "eps": 2.0, "weight_decay": 2.0}
        arguments |= {"lr": 0.5, "gamma": 0.5, "eps": 2.0, "weight_decay": 1.0}
        hessian = pick([0, 4, 8, 16], size, wide)
        if rule == "sophia":  # 3/4 h + 1/4 estimate is 2, 4 or 8 where h is 0, and 8 or 16 where it is 8
            hessian = pick([0, 8], size, wide)
            estimate = torch.where(hessian == 0, pick([8, 16, 32], size, wide), pick([8, 40], size, wide))
            arguments["estimate"] = estimate.to(dtype)
        return {**arguments, "state": (first, hessian.flatten()[chosen_of(mask, torch.Size(size))])}

    return build


def step_answer(rule: str) -> Callable[[Arguments], list[Tensor]]:
    def answer(a: Arguments) -> list[Tensor]:
        at = chosen_of(a["mask"], a["param"].shape)
        param, grad = a["param"].double().clone(), 0.5 * a["grad"].double().flatten()[at]
        m, v = (tensor.double() for tensor in a["state"])
        m = m / 2 + grad / 2
        if rule == "adamw":  # lr / (1 - 1/2), and (1 - 3/4)^-1/2
            v = 3 * v / 4 + grad.square() / 4
            change = 0.5 * m / (2 * v.sqrt() + 2)
        else:
            if "estimate" in a:
                v = 3 * v / 4 + a["estimate"].double().flatten()[at] / 4
            change = 0.5 * (m / (v / 2).clamp(min=2)).clamp(-1, 1)
        flat_param = param.flatten()
        flat_param[at] = flat_param[at] / 2 - change
        param = flat_param.view(a["param"].shape)
        return [param, param, m, v]

    return answer


def step_contract(op: str, rule: str, rows: bool) -> Contract:
    name = f"{op} {'rows' if rows else 'bits'}{' without estimate' if rule == 'plain sophia' else ''}"
    # A shape of the state says nothing: it holds one number a selected weight.
    free = frozenset({("state[0]", "dims"), ("state[1]", "dims")})
    return Contract(
        name, op, getattr(fk, op), step_build(rows, rule), step_answer(rule), written=("param", "state"),
        contiguous=("param", "state"), anything_goes=free,
    )  # fmt: skip


CONTRACTS = (
    *(norm_contract(form) for form in ("auto", "gram", "explicit")),
    dot_contract(False),
    dot_contract(True),
    Contract("ghost_gram", "ghost_gram", fk.ghost_gram, gram_build, gram_answer, thread_proof=False),
    outer_contract(True),
    outer_contract(False),
    Contract(
        "sample_moments", "sample_moments", fk.sample_moments, moments_build, moments_answer,
        written=("second", "absolute"), many_programs=True,
    ),
    outer_sketch_contract("oporp", 61),
    outer_sketch_contract("countsketch", 256),
    outer_sketch_contract("rademacher", 16),
    outer_sketch_contract("gaussian", 16),
    sketch_contract("oporp", 61),
    sketch_contract("countsketch", 256),
    sketch_contract("sjlt", 36),
    sketch_contract("rademacher", 16),
    sketch_contract("gaussian", 17),
    factored_contract("factored", 5, 7),
    factored_contract("factored-sjlt", 8, 4),
    factored_contract("tensorsketch", 64),
    Contract("soir_sweep", "soir_sweep", fk.soir_sweep, sweep_build, sweep_answer, roundoff=64.0, many_programs=True),
    Contract(
        "top_mask", "top_mask", fk.top_mask, top_build, top_answer,
        anything_goes=frozenset((f"scores[{t}]", shape) for t in range(3) for shape in ("dims", "scalar", "longer")),
    ),
    Contract(
        "masked_norm", "masked_norm", fk.masked_norm, norm_build, norm_answer,
        anything_goes=frozenset({("grads[0]", "dims"), ("grads[1]", "longer")}),  # one shape more, one row more
    ),
    *(step_contract("masked_adamw_", "adamw", rows) for rows in (False, True)),
    *(step_contract("masked_sophia_", rule, rows) for rule, rows in (("sophia", False), ("plain sophia", True))),
)  # fmt: skip


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
    """The arguments with every tensor replaced by change(name, tensor)."""
    made = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            made[name] = change(name, value)
        elif isinstance(value, (list, tuple)):
            parts = [change(f"{name}[{i}]", p) if isinstance(p, Tensor) else p for i, p in enumerate(value)]
            made[name] = type(value)(parts)
        else:
            made[name] = value
    return made
