"""The formulas of docs/method.md, written out in float64 from every sample's own gradient by batch-1 autograd."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fillm.data import SampleSet
from tests.capture.reference import reference_gradients, toy_samples
from tests.families import build_family

Gradients = list[dict[str, Tensor]]


def rows_of(samples: SampleSet) -> list[dict[str, Any]]:
    """Samples as ready-made rows, which need no tokenizer."""
    return [{"input_ids": list(sample.input_ids), "labels": list(sample.labels)} for sample in samples]


FORGET, RETAIN = toy_samples(4, seed=1), toy_samples(6, seed=2)
FORGET_ROWS, RETAIN_ROWS = rows_of(FORGET), rows_of(RETAIN)


class Direct:
    """What a ranking says of every tensor, from all gradients at once.

    Attributes:
        f, g: gradients of each forget and each retain sample.
        v, r: their means.
        lambda_: equation (1).
        u: equation (2), zero without a retain gradient.
    """

    def __init__(self, f: Gradients, g: Gradients, damping: float = 0.1) -> None:
        self.f, self.g, self.n = f, g, len(g)
        self.v = {name: torch.stack([one[name] for one in f]).mean(0) for name in f[0]}
        self.r = {name: torch.stack([one[name] for one in g]).mean(0) for name in g[0]}
        self.lambda_: dict[str, float] = {}
        self.u: dict[str, Tensor] = {}
        for name, v in self.v.items():
            # A sum that is zero in exact arithmetic, such as the gradient of a key bias, is not zero to the bit.
            if max(float(one[name].abs().max()) for one in [*f, *g]) < 1e-7:
                v = self.v[name] = torch.zeros_like(v)
                for one in [*f, *g]:
                    one[name] = torch.zeros_like(v)
            q = [float(one[name].square().sum()) for one in g]
            lambda_ = self.lambda_[name] = damping * sum(q) / len(g) / v.numel()
            u = torch.zeros_like(v)
            if lambda_ > 0:
                w = sum(one[name] * (float((one[name] * v).sum()) / (lambda_ + q[i])) for i, one in enumerate(g))
                u = -(v - w / len(g)) / lambda_
            self.u[name] = u

    def soir_sum(self, name: str, damping: float = 0.1) -> Tensor:
        """`u` of `soir-sum`."""
        v, r = self.v[name], self.r[name]
        return -(v - r * (r * v).sum() / (damping + r.square().sum())) / (self.n * damping)

    def unused(self) -> set[str]:
        """Tensors that no gradient of either set reaches."""
        return {name for name in self.v if not any(bool(one[name].any()) for one in [*self.f, *self.g])}


def direct_of(model: nn.Module, damping: float = 0.1) -> Direct:
    """The formulas for one model on `FORGET` and `RETAIN`."""
    return Direct(reference_gradients(model, FORGET), reference_gradients(model, RETAIN), damping)


@cache
def family(name: str) -> tuple[nn.Module, Direct]:
    """A family's tiny model, and the formulas."""
    model = build_family(name)
    return model, direct_of(model)
