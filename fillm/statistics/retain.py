"""The retain pass: two scalars a sample and tensor, and, the weighted sum `w = (1/n) sum_i c_i g_i`.

`c_i = d_i / (lambda + q_i)` needs `lambda`, which is known when the pass is over. The sum is therefore taken with an
estimate `l` from the first batch and corrected: small tensors accumulate further terms of the expansion of
`1 / (lambda + q)` around `l`, and samples that this does not cover are visited again (docs/method.md).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fillm.capture import PerSampleGradients, is_shared, norms_and_dots
from fillm.statistics.accumulators import first_not_finite, squared_norm, zeros_like
from fillm.statistics.influence import Scalars

EXPANSION_NUMEL = 1 << 13  # tensors up to this size carry the higher terms: more accumulators cost them little
EXPANSION_TERMS = 8
REVISIT_TOLERANCE = 1e-6  # error of w that samples not visited again may leave, as a part of |v|
SKIPPED_COSINE = 1.25  # times the root of the tolerance: gradients closer to orthogonal to v are left to the bracket


class RetainMoments:
    """`q_i`, `d_i` and optionally `w` for every tensor.

    Args:
        forget_mean: `v` of every tensor in scope.
        count: number of retain samples `n`.
        damping: the factor in docs/method.md (1).
        weighted: tensors that also accumulate `w`.
        tolerance: relative width that a bracket may have: `w` then leaves out samples whose gradient is nearly
            orthogonal to `v`. None sums every sample.

    Attributes:
        alike: what of `state()` is the same in all processes that share a pass; the rest adds up over them.
    """

    alike = ("estimate/",)

    def __init__(
        self,
        forget_mean: Mapping[str, Tensor],
        count: int,
        damping: float,
        weighted: Iterable[str] = (),
        tolerance: float | None = None,
    ) -> None:
        self.v, self.count, self.damping, self.tolerance = forget_mean, count, damping, tolerance
        self.q = {name: torch.zeros(count, dtype=torch.float64) for name in forget_mean}
        self.d = {name: torch.zeros(count, dtype=torch.float64) for name in forget_mean}
        self.forget_sq_norm = {name: squared_norm(v) for name, v in forget_mean.items()}
        self.estimate: dict[str, float] = {}  # l
        self._followed = False
        self.sums: dict[str, list[Tensor]] = {}  # W_j, j = 0 .. EXPANSION_TERMS or 0 alone
        self.summed: dict[str, Tensor] = {}  # [n], samples that w holds
        for name in weighted:
            v = forget_mean[name]
            terms = 1 + (EXPANSION_TERMS if v.numel() <= EXPANSION_NUMEL else 0)
            self.sums[name] = [zeros_like(v) for _ in range(terms)]
            self.summed[name] = torch.zeros(count, dtype=torch.bool)

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Records a batch: (4) and (5), and (6) where `w` is kept."""
        q, d = norms_and_dots(gradients, self.v[name])
        where = positions.cpu()
        self.q[name][where], self.d[name][where] = q.cpu(), d.cpu()
        if name not in self.sums:
            return
        if self.estimate.get(name, 0.0) == 0.0:
            if self._followed:
                return  # sums around different estimates would not add up
            self.estimate[name] = self.damping * float(q.mean()) / self.v[name].numel() if len(q) else 0.0
        base = self.estimate[name] + q
        c = torch.where(base > 0, d / base.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        if self.tolerance is not None and self.v[name].numel() > EXPANSION_NUMEL:
            # A fixed threshold, so that what is summed does not depend on how samples were batched.
            cosine = SKIPPED_COSINE * self.tolerance**0.5
            c = torch.where(d.abs() >= cosine * (self.forget_sq_norm[name] * q).sqrt(), c, 0.0)
        self.summed[name][where] = (c != 0).cpu()
        if not bool(c.any()) and not is_shared(gradients):  # what several processes add up, none leaves out
            return
        # Higher terms are kept in units of l, so that they neither overflow nor underflow float32.
        for total in self.sums[name]:
            gradients.add_weighted_(total, c, alpha=1.0 / self.count)
            c = torch.where(base > 0, c * self.estimate[name] / base.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    def lead(self) -> Tensor:
        """What the first batch fixes for all others: `l` of every tensor, 0 where it found none; [tensors], float64."""
        return torch.tensor([self.estimate.get(name, 0.0) for name in self.sums], dtype=torch.float64)

    def follow(self, led: Tensor) -> None:
        """Takes what another process's `lead` has found. A tensor without `l` is summed no more, but visited again."""
        self.estimate = dict(zip(self.sums, led.tolist(), strict=True))
        self._followed = True

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The first tensor and sample among `positions` with a NaN or infinite gradient."""
        return first_not_finite(positions, self.q, self.d)

    def scalars(self, name: str) -> Scalars:
        """The scalars of one tensor."""
        return Scalars(self.v[name].numel(), self.forget_sq_norm[name], self.q[name], self.d[name], self.damping)

    def weighted_sum(self, name: str) -> tuple[Tensor, Tensor]:
        """`w` from the accumulated terms, and how far each sample's part in it is off.

        Returns:
            `w`, and `delta` [n]: `w + (1/n) sum_i delta_i g_i` is exact.
        """
        scalars = self.scalars(name)
        estimate = self.estimate.get(name, 0.0)
        exact = scalars.coefficients()
        base = (estimate + scalars.q).clamp(min=torch.finfo(torch.float64).tiny)
        ratio, term = estimate / base, torch.where(self.summed[name], scalars.d / base, 0.0)
        step = (estimate - scalars.lambda_) / estimate if estimate > 0 else 0.0
        best = (float("inf"), exact, 0)
        approximate = torch.zeros_like(exact)
        for j in range(len(self.sums[name])):
            approximate = approximate + term * step**j
            term = term * ratio
            delta = exact - approximate
            left = float((delta.abs() * scalars.q.sqrt()).sum())
            if left < best[0]:
                best = (left, delta, j)
        _, delta, terms = best
        w = self.sums[name][0].clone()
        for j in range(1, terms + 1):
            w.add_(self.sums[name][j], alpha=step**j)
        return w, delta

    def partial_bracket(self, name: str) -> tuple[float, float]:
        """The bracket that the samples in `w` leave, (3c) of docs/method.md."""
        scalars, summed = self.scalars(name), self.summed[name]
        w, delta = self.weighted_sum(name)
        error = float((delta.abs() * scalars.q.sqrt())[summed].sum()) / self.count
        length = squared_norm(w)
        return scalars.partial_bracket(summed, squared_norm(w.neg_().add_(self.v[name])), length, error)

    def to_revisit(self, name: str, delta: Tensor) -> Tensor:
        """The part of `delta` that matters, [n]: the smallest differences, `REVISIT_TOLERANCE` in all, are let go."""
        scalars = self.scalars(name)
        parts = delta.abs() * scalars.q.sqrt() / self.count
        order = torch.argsort(parts)
        covered = parts[order].cumsum(0) <= REVISIT_TOLERANCE * scalars.forget_sq_norm**0.5
        out = delta.clone()
        out[order[covered]] = 0.0
        return out

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        out: dict[str, Tensor] = {}
        for name in self.q:
            out |= {f"q/{name}": self.q[name], f"d/{name}": self.d[name]}
        for name, sums in self.sums.items():
            out |= {f"sum{j}/{name}": total for j, total in enumerate(sums)}
            out[f"estimate/{name}"] = torch.tensor(self.estimate.get(name, 0.0), dtype=torch.float64)
            out[f"summed/{name}"] = self.summed[name]
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name in self.q:
            self.q[name].copy_(state[f"q/{name}"])
            self.d[name].copy_(state[f"d/{name}"])
        for name in list(self.sums):
            if f"sum0/{name}" not in state:
                del self.sums[name]
                continue
            for j, total in enumerate(self.sums[name]):
                total.copy_(state[f"sum{j}/{name}"])
            self.estimate[name] = float(state[f"estimate/{name}"])
            self.summed[name].copy_(state[f"summed/{name}"])


class WeightedSum:
    """`(1/n) sum_i weights_i g_i` with weights known beforehand: the restricted pass and the revisits.

    Args:
        parameters: tensors to sum for, or accumulators for them: the sums lie where these do.
        weights: name -> [n], float64; samples with weight zero need not be visited.
        count: `n`.
    """

    def __init__(self, parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], count: int) -> None:
        self.weights, self.count = dict(weights), count
        self.total = {name: zeros_like(parameters[name]) for name in weights}

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch."""
        weights = self.weights[name][positions.cpu()].to(self.total[name].device)
        if bool(weights.any()) or is_shared(gradients):
            gradients.add_weighted_(self.total[name], weights, alpha=1.0 / self.count)

    def samples(self) -> list[int]:
        """Positions of the samples with a weight in any tensor."""
        if not self.weights:
            return []
        return torch.stack([w != 0 for w in self.weights.values()]).any(0).nonzero().squeeze(1).tolist()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {f"total/{name}": tensor for name, tensor in self.total.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name, tensor in self.total.items():
            tensor.copy_(state[f"total/{name}"])
