"""The ops that `python -m benchmarks.gpu` expects at the speed of memory: fresh inputs, bytes that must move, spots."""

from collections.abc import Iterator
from functools import partial

import fillm_kernels as fk
import torch
from torch import Tensor

from benchmarks.kernels.gpu_calls import (
    TOLERANCE,
    Beside,
    Call,
    Case,
    Given,
    excess_of,
    name_of,
    reference,
    relative,
)
from benchmarks.kernels.gpu_checks import norm_of, step_of

SECTOR = 32  # bytes a GPU fetches at least
PIECE = 1 << 22  # coordinates of a vector that the spot check sketches at a time in float64


def stream_cases(device: torch.device, shrink: int, reduced: bool) -> Iterator[Case]:
    """`sketch`, `soir_sweep`, `top_mask` and the masked ops."""
    yield from _sketch_cases(device, shrink, reduced)
    yield from _sweep_cases(device, shrink, reduced)
    yield from _mask_cases(device, shrink, reduced)


def sketch_shapes(shrink: int) -> list[tuple[int, int, torch.dtype]]:
    """B, P and element type of 256 MB of input and more."""
    wide, narrow = torch.float32, torch.bfloat16
    shapes = [(1, 1 << 26, wide), (8, 1 << 25, wide), (32, 1 << 24, wide)]
    shapes += [(1, 1 << 27, narrow), (8, 1 << 26, narrow), (32, 1 << 25, narrow)]
    return [(samples, max(4096, count // shrink**2), dtype) for samples, count, dtype in shapes]


def _sketch_cases(device: torch.device, shrink: int, reduced: bool) -> Iterator[Case]:
    dim = max(64, 4096 // shrink)
    for samples, count, dtype in sketch_shapes(shrink):
        for kind in ("oporp", "countsketch", "sjlt"):
            yield _sketch_case(device, samples, count, dim, kind, dtype, reduced)
    # Beyond 2^31 entries.
    yield _sketch_case(device, 33, max(4096, (1 << 26) // shrink**2), dim, "oporp", torch.bfloat16, reduced)
    for dtype in (torch.float32, torch.bfloat16):
        yield _sketch_case(device, 8, max(4096, (1 << 22) // shrink**2), 64, "gaussian", dtype, reduced)


def _sketch_case(
    device: torch.device, samples: int, count: int, dim: int, kind: str, dtype: torch.dtype, reduced: bool
) -> Case:
    count = min(count, 1 << 18) if reduced else count
    run = partial(fk.sketch, dim=dim, kind=kind)

    def last_row(given: Given) -> float:
        """The last vector, whose entries lie furthest, sketched piece by piece in float64."""
        row, want = given["g"][-1:], torch.zeros(1, dim, dtype=torch.float64, device=device)
        for begin in range(0, count, PIECE):
            piece = row[:, begin : begin + PIECE].double()
            want += reference(lambda piece=piece, begin=begin: run(piece, offset=begin))
        return relative(run(**given)[-1:], want)

    dense = kind == "gaussian"
    return Case(
        op="sketch", label=f"{kind}, {samples} x {count} to {dim} {name_of(dtype)}", dtype=dtype,
        inputs=lambda: {"g": _randn(samples, count, device, dtype)}, run=run,
        flop=2.0 * samples * count * dim if dense else 0.0, bytes=samples * (count * dtype.itemsize + 4.0 * dim),
        target=None if dense else 0.85, spot=last_row,
    )  # fmt: skip


def _randn(samples: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B, P] in its own type at once: no float32 copy of a narrow matrix."""
    return torch.randn(samples, count, device=device, dtype=dtype)


def _sweep_cases(device: torch.device, shrink: int, reduced: bool) -> Iterator[Case]:
    for tensors, n, k, dtype in (
        (1, 4096, 65536, torch.float32), (32, 512, 4096, torch.float32), (32, 512, 16384, torch.bfloat16),
    ):  # fmt: skip
        n, k = max(8, n // shrink), max(64, k // shrink)
        if reduced:
            tensors, n, k = min(tensors, 4), min(n, 128), min(k, 4096)

        def store(tensors: int = tensors, n: int = n, k: int = k, dtype: torch.dtype = dtype) -> Given:
            s = torch.randn(tensors, n, k, device=device, dtype=dtype)
            return {"s": s, "v": torch.randn(tensors, k, device=device).to(dtype),
                    "norms": k * (0.5 + torch.rand(tensors, n, device=device))}  # fmt: skip

        yield Case(
            op="soir_sweep", label=f"{tensors} x {n} x {k} {name_of(dtype)}", dtype=dtype, inputs=store,
            run=partial(fk.soir_sweep, damping=0.1, numel=10 * k), flop=4.0 * tensors * n * k,
            bytes=float(dtype.itemsize) * tensors * n * k, target=0.8, spot=partial(_sweep_spot, 10 * k),
            beside=(Beside("two products", lambda g: (g["s"] @ g["v"][:, :, None]).mT @ g["s"]),),
        )  # fmt: skip


def _sweep_spot(numel: int, given: Given) -> float:
    """The last dots, and the last columns of the weighted sums from all dots."""
    found, (s, v, norms) = fk.soir_sweep(**given, damping=0.1, numel=numel), given.values()
    dots = (s[:, -8:].double() * v.double()[:, None]).sum(2)
    lam = 0.1 * norms.double().mean(1, keepdim=True) / numel
    c = found.dots.double() / (lam + norms.double())
    weighted = (c[:, :, None] * s[:, :, -16:].double()).sum(1)
    return max(relative(found.dots[:, -8:], dots), relative(found.weighted[:, -16:], weighted))


def _mask_cases(device: torch.device, shrink: int, reduced: bool) -> Iterator[Case]:
    count = min((1 << 28) // shrink**2, 1 << 20 if reduced else 1 << 28)
    for dtype in (torch.float32, torch.bfloat16):
        # Three reads of float32 and two of 16-bit scores: 16 bits of the key in each but the last, which writes bits.
        reads = 3 if dtype == torch.float32 else 2
        yield Case(
            op="top_mask", label=f"10 % of {count} {name_of(dtype)}", dtype=dtype,
            inputs=lambda dtype=dtype: {"scores": [_randn(1, part, device, dtype) for part in (count // 2,) * 2],
                                        "budget": count // 10},
            run=lambda **given: tuple(fk.top_mask(**given)), flop=0.0,
            bytes=float(reads * dtype.itemsize * count + count / 8), target=0.8, spot=_top_spot,
            beside=(Beside("topk of all", lambda g: torch.cat(g["scores"], 1).topk(g["budget"]).values[0, -1]),),
        )  # fmt: skip
    for dtype, density in ((torch.float32, 0.1), (torch.float32, 1.0), (torch.bfloat16, 1.0)):
        yield from _step_cases(device, dtype, count, density)


def _top_spot(given: Given) -> float:
    """Threshold and number of bits by counting: 0 if both are right, infinity if not."""
    scores, budget = given["scores"], given["budget"]
    bits, threshold = fk.top_mask(**given)
    above = sum(int((part > threshold).sum()) for part in scores)
    least = sum(int((part >= threshold).sum()) for part in scores)
    chosen = sum(fk.select_bits(mask, part.numel()).count for mask, part in zip(bits, scores, strict=True))
    return 0.0 if above < budget <= least and chosen == budget else float("inf")


def _step_cases(device: torch.device, dtype: torch.dtype, count: int, density: float) -> Iterator[Case]:
    """Bits of all weights; whole sectors of parameter and gradient; states of the selected weights, which lie dense."""
    touched = count * (1 - (1 - density) ** (SECTOR / dtype.itemsize))

    def moved(passes: int, states: int) -> float:
        return count / 8 + passes * touched * dtype.itemsize + states * density * count * 4.0

    label = f"{density:.0%} of {count} {name_of(dtype)}"
    for op, run, size, written in (
        ("masked_adamw_", partial(fk.masked_adamw_, step=3, lr=0.5), moved(3, 4), ("param", "state")),
        ("masked_sophia_", partial(fk.masked_sophia_, lr=0.5), moved(3, 3), ("param", "state")),
        ("masked_norm", norm_of, moved(1, 0), ()),
    ):
        call = Call(op=op, label=label, dtype=dtype, run=run, written=written,
                    inputs=partial(step_of, device, dtype, count, density, state=bool(written)))  # fmt: skip
        # The spot is the whole step: the reference goes through it a million weights at a time.
        yield Case(**vars(call), flop=0.0, bytes=size, target=0.8, allowed=max(TOLERANCE, torch.finfo(dtype).eps),
                   spot=lambda given, call=call: excess_of(call, given)[0])  # fmt: skip
