"""Contracts of the ops on scores and masks: whole numbers, powers of two and their roots, so that all is exact."""

import math
from collections.abc import Callable, Sequence

import fillm_kernels as fk
import torch
from torch import Tensor

from tests.kernels.contract import Arguments, Contract, Shape, whole, wide_of


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


MASK_CONTRACTS = (
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
