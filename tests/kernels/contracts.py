"""One table of all ops: how each is called, and an answer in float64 that shares no code with it.

Arguments are small whole numbers and halves, chosen so that every product and sum is exact in float32 in whatever order
it is taken: where a contract's `roundoff` is 0 every backend, element type and memory layout must give the answer to
the bit. What takes a division, a logarithm or a transform states what it may lose.
"""

import fillm_kernels as fk
import torch
from torch import Tensor

from tests.kernels.contract import Arguments, Contract, Shape, whole, wide_of
from tests.kernels.law import projection, two_sided
from tests.kernels.mask_contracts import MASK_CONTRACTS
from tests.kernels.ragged import gradients


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
        answer, roundoff=INEXACT if kind == "gaussian" else 0.0, many_programs=True,
    )  # fmt: skip


def sketch_contract(kind: str, dim: int, places: bool = False) -> Contract:
    def build(shape: Shape, dtype: torch.dtype) -> Arguments:
        g = whole(len(shape.lengths), shape.inputs * shape.outputs, dtype=dtype, low=-3, high=3)
        offset = 2**33 + 7 + (torch.arange(len(shape.lengths)) > 1) * 9 if places else 2**33 + 7
        return {"g": g, "dim": dim, "kind": kind, "seed": 2**40 + 3, "offset": offset}

    def answer(a: Arguments) -> list[Tensor]:
        g, seed, count = a["g"].double(), a["seed"], a["g"].shape[1]
        if not places:
            return [g @ projection(kind, seed, dim, count, offset=a["offset"])]
        maps = [projection(kind, seed, dim, count, offset=at) for at in a["offset"].tolist()]
        return [torch.einsum("bp,bpk->bk", g, torch.stack(maps)) if maps else g.new_zeros(0, dim)]

    return Contract(
        f"sketch {kind}{' of rows at places' if places else ''}", "sketch", fk.sketch, build, answer,
        roundoff=INEXACT if kind == "gaussian" else 0.0,
        # A tensor of no dimension is a whole number, for all rows.
        anything_goes=frozenset({("offset", "scalar") if places else ("g", "longer")}),
        many_programs=True, not_on=("cuda",) if kind in ("gaussian", "rademacher") else (),
    )  # fmt: skip


def factored_contract(kind: str, *dims: int) -> Contract:
    return Contract(
        f"factored_sketch {kind}", "factored_sketch", fk.factored_sketch,
        lambda shape, dtype: {**ragged(shape, dtype), "dims": dims, "kind": kind, "seed": 2**40 + 3},
        lambda a: [two_sided(kind, a["seed"], dims, of(a))],
        roundoff=0.0 if kind == "factored-sjlt" else INEXACT, thread_proof=kind != "tensorsketch",
        many_programs=True,
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
    sketch_contract("rademacher", 16, places=True),
    factored_contract("factored", 5, 7),
    factored_contract("factored-sjlt", 8, 4),
    factored_contract("tensorsketch", 64),
    Contract("soir_sweep", "soir_sweep", fk.soir_sweep, sweep_build, sweep_answer, roundoff=64.0, many_programs=True),
    *MASK_CONTRACTS,
)  # fmt: skip
