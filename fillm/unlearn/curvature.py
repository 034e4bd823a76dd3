"""Second derivative of a set's loss along a direction, `u^T H u`, over all tensors of a mask at once.

    L(t) = sum_b L_b(theta + t u)          L'(0) = sum_b <g_b, u>          L''(0) = u^T (sum_b H_b) u

`t` is the only variable: its first derivative is formed with a graph and derived again (Pearlmutter, Neural Computation
6(1), 1994, by two backward passes). Not by nested forward mode: torch's second forward derivative of a layer norm is
silently wrong. Where an operation of the model has no second backward pass, central differences of `L'` take its place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fillm.capture import frozen
from fillm.capture.losses import answer_logits, over_samples
from fillm.data import Batch, SampleSet, collate
from fillm.errors import NumericsError
from fillm.runs.memory import is_out_of_memory

TWO_BACKWARD_PASSES = "two backward passes"
_PLAIN_ATTENTION = ("eager", "sdpa")  # those of transformers that have a second backward pass
_PROBES = 2  # samples of each set on which two backward passes are checked, and the step of differences is chosen
_LADDER = [4.0**-k for k in range(1, 9)]  # lengths tried, relative to that of the selected weights
_AGREES, _SPREADS = 0.05, 4.0  # what may lie between the two: of the value, and of the differences' own uncertainty


class SummedCurvature:
    """Sum of the samples' second derivatives, float64."""

    def __init__(self) -> None:
        self.total = torch.zeros(1, dtype=torch.float64)

    def observe(self, name: str, curvature: Tensor, positions: Tensor) -> None:
        """Adds a batch: [1] float64."""
        self.total += curvature

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {"total": self.total}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        self.total.copy_(state["total"])


@dataclass
class CurvatureAlong:
    """Runs batches as a `Capture` does, and hands out the sum of their samples' second derivatives along `u`.

    A batch takes the memory of a training step's and of its backward pass once more; `u` and a copy of the weights it
    moves are held besides.

    Attributes:
        model: a causal language model, left as it is.
        update: `u` by tensor, in float32 or wider.
        alone: why samples may not share a batch; empty if they may.
        step: None for two backward passes; else the `t` of central differences, which are taken in float32 weights.
        reason: why it is central differences.
    """

    model: nn.Module
    update: Mapping[str, Tensor]
    alone: str = ""
    step: float | None = None
    reason: str = ""
    fallback: dict[str, str] = field(default_factory=dict)  # of a Capture; never anything here

    @classmethod
    def tried(
        cls, model: nn.Module, update: Mapping[str, Tensor], sets: Sequence[SampleSet], alone: str = ""
    ) -> "CurvatureAlong":
        """By two backward passes if they agree with central differences on a few short samples, else by these.

        A fused kernel may have no second backward pass and say so, or leave itself out of it without a word.
        """
        found = cls(model, update, alone)
        probes = [
            collate(samples, [position])
            for samples in sets
            for position in sorted(range(len(samples)), key=samples.lengths.__getitem__)[:_PROBES]
        ]
        try:
            value = found._sum_over(probes)
            _, differences, spread = found._differences(probes, wide=False)
            if abs(value - differences) <= _AGREES * abs(differences) + _SPREADS * spread:
                return found
            found.reason = f"two backward passes gave {value:.3g} where differences gave {differences:.3g}"
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            found.reason = str(error).partition("\n")[0]
        found.step, _, _ = found._differences(probes, wide=True)
        return found

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        return next(self.model.parameters()).device

    @property
    def how(self) -> str:
        """`two backward passes`, or which differences and why."""
        if self.step is None:
            return TWO_BACKWARD_PASSES
        return f"central differences of the slope at +-{self.step:.3g} u, in float32 weights ({self.reason})"

    def run(self, batch: Batch, samples: SampleSet, observe: Callable[[str, Tensor, Tensor], None]) -> Tensor:
        """One batch: `observe("", sum of second derivatives [1] float64, positions [B])`.

        Args:
            batch: the collated batch, on any device.
            samples: the set that it was made from.
            observe: see above.

        Returns:
            [B] each sample's loss, float64, on the CPU.
        """
        parts = [batch]
        if self.alone and len(batch.indices) > 1:
            parts = [collate(samples, [position], batch.layout) for position in batch.indices.tolist()]
        losses, curvatures = zip(*(self._derive(part) for part in parts), strict=True)
        curvature = torch.stack(curvatures).sum(0, keepdim=True)
        if not bool(curvature.isfinite()):
            ids = ", ".join(samples[position].id for position in batch.indices.tolist()[:3])
            raise NumericsError(f"the curvature along u is not finite in a batch of {ids}, ...; give --dtype float32")
        observe("", curvature, batch.indices)
        return torch.cat(losses)

    def _derive(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses [B] and the second derivative of their sum, float64, on the CPU."""
        if self.step is not None:
            losses, above = self._at(self.step, batch, wide=True)
            return losses, (above - self._at(-self.step, batch, wide=True)[1]) / (2 * self.step)
        return self._at(0.0, batch, twice=True)

    def _at(self, t: float, batch: Batch, wide: bool = False, twice: bool = False) -> tuple[Tensor, Tensor]:
        """Losses [B] at `theta + t u`, and the first derivative of their sum, or the second."""
        with frozen(self.model), torch.enable_grad(), _differentiable_attention(self.model):
            time = torch.tensor(t, dtype=torch.float64, device=self.device, requires_grad=True)
            losses = functional_call(_Losses(self.model), self._weights(time, wide), (batch.to(self.device),))
            found = torch.zeros_like(time)
            if losses.requires_grad:
                (found,) = torch.autograd.grad(losses.sum(), time, create_graph=twice)
            if twice:
                if found.requires_grad:
                    # Not `grad`: it passes by what refuses a second time, and leaves its part out.
                    found.backward()
                found = torch.zeros_like(time) if time.grad is None else time.grad
        return losses.detach().double().cpu(), found.detach().cpu()

    def _weights(self, time: Tensor, wide: bool) -> dict[str, Tensor]:
        """`theta + t u` of the tensors of `u`, as `_Losses` names them; all others in float32 too if `wide`."""
        weights = {}
        for name, weight in self.model.named_parameters():
            dtype = torch.promote_types(weight.dtype, torch.float32) if wide else weight.dtype
            if name in self.update:
                u = self.update[name]
                weights[f"model.{name}"] = (weight.to(u.dtype) + time.to(u.dtype) * u).to(dtype)
            elif dtype != weight.dtype:
                weights[f"model.{name}"] = weight.to(dtype)
        return weights

    def _sum_over(self, probes: Sequence[Batch]) -> float:
        return sum(float(self._derive(probe)[1]) for probe in probes)

    def _differences(self, probes: Sequence[Batch], wide: bool) -> tuple[float, float, float]:
        """Central differences where they change least from one step to the next: longer, and higher derivatives count;
        shorter, and rounding.

        Args:
            probes: what they are taken of.
            wide: whether in float32 weights or in the model's own.

        Returns:
            The step, the second derivative of the probes' sum, and how far that of the next longer step is from it.
        """
        parameters = {name: weight.detach() for name, weight in self.model.named_parameters()}
        length = sum(float(u.double().square().sum()) for u in self.update.values()) ** 0.5
        size = sum(float((parameters[n] * (u != 0)).double().square().sum()) for n, u in self.update.items()) ** 0.5
        if length == 0.0:
            return 1.0, 0.0, 0.0
        found = []
        for relative in _LADDER:
            step = relative * (size or 1.0) / length
            slopes = [sum(float(self._at(t, probe, wide)[1]) for probe in probes) for t in (step, -step)]
            found.append((step, (slopes[0] - slopes[1]) / (2 * step)))
        longer, chosen = min(pairwise(found), key=lambda pair: abs(pair[0][1] - pair[1][1]))
        return *chosen, abs(longer[1] - chosen[1])


class _Losses(nn.Module):
    """Each sample's loss, by operations that can be derived twice; keeps the digits of tokens known by heart.

    `-log p = log(1 + sum_(others) exp(z - z_wanted))`, whose slope `1 - p` is never a difference of near-equals.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """[B], in nats a token."""
        logits, wanted = answer_logits(self.model, batch)
        logits, at = logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted[:, None]
        others = (logits - logits.gather(1, at)).scatter(1, at, -torch.inf)
        return over_samples(nn.functional.softplus(others.logsumexp(1)), batch)


@contextmanager
def _differentiable_attention(model: Any) -> Iterator[None]:
    """Attention that can be derived twice, which fused kernels cannot; the same function."""
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    with sdpa_kernel(SDPBackend.MATH):
        if chosen is None or chosen in _PLAIN_ATTENTION:
            yield
            return
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # a family that has none
            model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(chosen)
