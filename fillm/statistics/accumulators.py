"""Sums of per-sample gradients over a data set: one accumulator a tensor, however many samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fillm.capture import PerSampleGradients
from fillm.models.sharded_tensors import local, sharded_zeros, sum_in_order


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64 models, else float32."""
    return torch.promote_types(dtype, torch.float32)


def zeros_like(tensor: Tensor, offload: bool = False) -> Tensor:
    """A zeroed accumulator for one tensor, on its device; sharded as the tensor is.

    With `offload`, in CPU memory, page-locked where the tensor is on a GPU; so is one for an accumulator that is.
    """
    dtype = accumulator_dtype(tensor.dtype)
    if isinstance(tensor, DTensor):
        return sharded_zeros(tensor, dtype)
    pinned = tensor.is_cuda if offload else tensor.is_pinned()
    return torch.zeros(tensor.shape, dtype=dtype, device="cpu" if offload else tensor.device, pin_memory=pinned)


def squared_norm(tensor: Tensor) -> float:
    """`|tensor|^2` in float64, block by block, so that no float64 copy of the whole is made."""
    own = local(tensor)
    return _summed(tensor, sum(float(block.double().square().sum()) for block in _blocks(own)))


def inner(left: Tensor, right: Tensor) -> float:
    """`<left, right>` in float64, block by block."""
    pairs = zip(_blocks(local(left)), _blocks(local(right)), strict=True)
    return _summed(left, sum(float((a.double() * b.double()).sum()) for a, b in pairs))


def total(tensor: Tensor) -> float:
    """The sum of all entries, in float64."""
    return _summed(tensor, float(local(tensor).sum(dtype=torch.float64)))


def any_entry(tensor: Tensor) -> bool:
    """Whether an entry is other than 0."""
    return _summed(tensor, float(local(tensor).any())) > 0.0


def _summed(tensor: Tensor, own: float) -> float:
    """One number of this process's part, added up over the processes where `tensor` is sharded."""
    if not isinstance(tensor, DTensor):
        return own
    part = torch.tensor(own, dtype=torch.float64, device=local(tensor).device)
    return float(sum_in_order(part, tensor))


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.reshape(-1).split(1 << 20)


class MeanGradient:
    """`v = (1/m) sum_j f_j`, docs/method.md.

    Args:
        parameters: tensors in scope.
        count: number of samples `m`.
        offload: keep the mean in CPU memory.
    """

    def __init__(self, parameters: Mapping[str, Tensor], count: int, offload: bool = False) -> None:
        self.count = count
        self.mean = {name: zeros_like(p, offload) for name, p in parameters.items()}

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch."""
        gradients.add_weighted_(self.mean[name], None, alpha=1.0 / self.count)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {f"mean/{name}": tensor for name, tensor in self.mean.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name, tensor in self.mean.items():
            tensor.copy_(state[f"mean/{name}"])


class CombinedMeans:
    """`sum_k a_k (1/n_k) sum_i g_i` over several passes `k`, all in one accumulator a tensor.

    Args:
        storage: the accumulators, which are zeroed.

    Attributes:
        total: the sum so far, by tensor.
    """

    def __init__(self, storage: Mapping[str, Tensor]) -> None:
        self.total = {name: tensor.zero_() for name, tensor in storage.items()}
        self._alpha = 0.0

    def weigh(self, factor: float, count: int) -> None:
        """Sets `a` and `n` of the pass to come."""
        self._alpha = factor / count

    def start_from_zero(self) -> None:
        """Forgets the passes before, so that a sum over processes has them once: from the one that keeps them."""
        for tensor in self.total.values():
            tensor.zero_()

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch."""
        gradients.add_weighted_(self.total[name], None, alpha=self._alpha)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs: passes before this one included."""
        return {f"total/{name}": tensor for name, tensor in self.total.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name, tensor in self.total.items():
            tensor.copy_(state[f"total/{name}"])


class MeanPower(MeanGradient):
    """`(1/n) sum_i |g_i|^power` entry by entry: the mean absolute gradient, or the diagonal of the Fisher matrix.

    Args:
        parameters: tensors in scope.
        count: number of samples `n`.
        power: 1 or 2.
        offload: keep the mean in CPU memory.
    """

    def __init__(self, parameters: Mapping[str, Tensor], count: int, power: int, offload: bool = False) -> None:
        super().__init__(parameters, count, offload)
        self.power = power

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch."""
        gradients.add_powers_(self.mean[name], self.power, alpha=1.0 / self.count)


class SquaredNorms:
    """`q_i = |g_i|^2` alone, [samples] per tensor: finds the sample whose gradient is not finite."""

    def __init__(self, parameters: Mapping[str, Tensor], count: int) -> None:
        self.q = {name: torch.zeros(count, dtype=torch.float64) for name in parameters}

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Records a batch."""
        self.q[name][positions.cpu()] = gradients.squared_norms().cpu()

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """The first tensor and sample among `positions` with a NaN or infinite gradient."""
        return first_not_finite(positions, self.q)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {f"q/{name}": q for name, q in self.q.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name, q in self.q.items():
            q.copy_(state[f"q/{name}"])


def first_not_finite(positions: Sequence[int], *scalars: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """The first (tensor, sample) among `positions` where a per-sample scalar is not finite."""
    where = torch.tensor(list(positions))
    for values in scalars:
        for name, value in values.items():
            bad = (~value[where].isfinite()).nonzero()
            if bad.numel():
                return name, int(where[bad[0, 0]])
    return None


class Together:
    """Several statistics of one pass.

    Args:
        parts: by a name of their own, under which their states are kept.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch to each."""
        for part in self.parts.values():
            part.observe(name, gradients, positions)

    def first_not_finite(self, positions: Sequence[int]) -> tuple[str, int] | None:
        """What the first part that looks says."""
        checks = (getattr(part, "first_not_finite", None) for part in self.parts.values())
        return next((found for check in checks if check is not None and (found := check(positions))), None)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {f"{key}/{name}": t for key, part in self.parts.items() for name, t in part.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for key, part in self.parts.items():
            head = f"{key}/"
            part.load({name.removeprefix(head): t for name, t in state.items() if name.startswith(head)})


@dataclass(frozen=True)
class Groups:
    """Which entries of a tensor are ranked together: all indices along an axis that share a group.

    Attributes:
        axis: 0 for rows (all leading dimensions flattened), 1 for columns.
        index: the group of every row or column, [length], int64.
        count: number of groups.
    """

    axis: int
    index: Tensor
    count: int

    def sum(self, values: Tensor) -> Tensor:
        """Adds up the entries of each group along the last axis: [..., length] -> [..., count]."""
        out = torch.zeros(*values.shape[:-1], self.count, dtype=values.dtype, device=values.device)
        return out.index_add_(-1, self.index.to(values.device), values)

    def sum_entries(self, tensor: Tensor) -> Tensor:
        """Adds up a tensor's entries by group, [count], float64."""
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(-1, 1)
        return self.sum(rows.sum(1 - self.axis, dtype=torch.float64))


class StepDots:
    """First and second moments of `s_i = <g_i, u>` over the retain set, (8): by tensor, group or element.

    Args:
        update: `u` of every tensor in scope.
        count: number of retain samples `n`.
        groups: per tensor, what is kept apart; absent for a whole tensor.
        element: keep every weight apart. As `u` is the same in all samples, gradients and their squares are summed.
    """

    def __init__(
        self,
        update: Mapping[str, Tensor],
        count: int,
        groups: Mapping[str, Groups] | None = None,
        element: bool = False,
    ) -> None:
        self.update, self.count, self.groups, self.element = update, count, dict(groups or {}), element
        self._mean: dict[str, Tensor] = {}
        self._mean_square: dict[str, Tensor] = {}
        for name, u in update.items():
            for moments in (self._mean, self._mean_square):
                if element:
                    moments[name] = zeros_like(u)
                else:
                    shape = (self.groups[name].count,) if name in self.groups else ()
                    moments[name] = torch.zeros(shape, dtype=torch.float64, device=u.device)

    def observe(self, name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        """Adds a batch."""
        u = self.update[name]
        if self.element:
            gradients.add_weighted_(self._mean[name], None, alpha=1.0 / self.count)
            gradients.add_powers_(self._mean_square[name], 2, alpha=1.0 / self.count)
            return
        if name in self.groups:  # a group's dot is summed before it is squared
            s = self.groups[name].sum(gradients.axis_dots(u, self.groups[name].axis))  # [B, groups]
        else:
            s = gradients.dots(u)  # [B]
        self._mean[name] += s.sum(0) / self.count
        self._mean_square[name] += s.square().sum(0) / self.count

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """`mean_i(s_i)` and `mean_i(s_i^2)` of one tensor, [], [groups] or of its shape; float64."""
        mean, mean_square = self._mean[name].double(), self._mean_square[name].double()
        if not self.element:
            return mean, mean_square
        u = self.update[name].double()
        return mean * u, mean_square * u.square()

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        first = {f"mean/{name}": tensor for name, tensor in self._mean.items()}
        return first | {f"mean_square/{name}": tensor for name, tensor in self._mean_square.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        for name in self.update:
            self._mean[name].copy_(state[f"mean/{name}"])
            self._mean_square[name].copy_(state[f"mean_square/{name}"])
