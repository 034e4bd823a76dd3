"""One forward and backward over a batch, in which every tensor's per-sample gradients pass by once."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fillm.capture.combined import ScaledGradients, combine
from fillm.capture.experts import followed_experts, fused_experts, replaced_forward
from fillm.capture.gradients import DenseGradients, PerSampleGradients
from fillm.capture.interception import Interception
from fillm.capture.losses import LossReduction, sample_losses
from fillm.capture.offloaded_gradients import finish_copies, offloading
from fillm.capture.rows import RowMap
from fillm.capture.rules import Rules
from fillm.data import Batch, SampleSet, collate

Observe = Callable[[str, PerSampleGradients, Tensor], None]
# Float16 has no numbers below 6e-8: the loss is multiplied by this in the backward pass, and the gradients divided.
FLOAT16_LOSS_SCALE = 1024.0


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter requiring a gradient; both restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def checkpointed_layers(model: nn.Module, interception: Interception) -> Iterator[None]:
    """Honours `model.gradient_checkpointing_enable()` in eval mode, where transformers would ignore it."""
    wrapped = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    with ExitStack() as stack:
        for module in wrapped:
            # Backward runs outside the interception; the recomputed forward has to be seen like the first.
            again = partial(
                checkpoint, module.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), interception)
            )
            stack.enter_context(replaced_forward(module, again))
        yield


class Capture:
    """Runs batches and hands out per-sample gradients, tensor by tensor, without forming `.grad`.

    Args:
        model: a causal language model; its parameters are left as they are.
        names: tensors in scope, names as in `named_parameters()`.
        loss_reduction: `mean` or `sum` over a sample's answer tokens.
        fallback: tensors for which no rule holds, with the reason; they take batch-1 autograd, exact and slower.
            Tensors met later in an operation without a rule are added.
        alone: why samples may not share a batch, empty if they may; batches are then run sample by sample.
        noise: tensors whose gradient is rounding noise, with the norm up to which it is: such samples are left out,
            and what is larger takes batch-1 autograd.

    Attributes:
        offload: whether accumulators lie in CPU memory: `run` then hands out `OffloadedGradients`.
    """

    offload = False

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss_reduction: LossReduction = "mean",
        fallback: Mapping[str, str] | None = None,
        alone: str = "",
        noise: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.loss_reduction, self.alone = model, loss_reduction, alone
        every = dict(model.named_parameters())
        self.parameters = {name: every[name] for name in names}
        self.operands = self.parameters  # what the model computes with: under FSDP2 other tensors than it holds
        self.fallback, self.noise = dict(fallback or {}), dict(noise or {})
        self._experts = fused_experts(model)
        self._scale = FLOAT16_LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        return next(self.model.parameters()).device

    def like(self, names: Sequence[str], model: nn.Module | None = None) -> "Capture":
        """A capture of some tensors of this model, or of a copy of it, that has learned what this one knows."""
        alike = Capture(model or self.model, names, self.loss_reduction, self.fallback, self.alone, self.noise)
        alike.offload = self.offload
        return alike

    def run(self, batch: Batch, samples: SampleSet, observe: Observe) -> Tensor:
        """One batch: `observe(name, gradients, positions)` is called once for every tensor that a gradient reaches.

        With `alone`, and for tensors in `fallback`, it is called once a sample.

        Args:
            batch: the collated batch, on any device.
            samples: the set the batch was made from (what runs sample by sample reads them again).
            observe: receives the name, the batch's per-sample gradients and the samples' positions [B] in the set.

        Returns:
            [B] each sample's loss, float64, on the CPU.
        """
        if self.offload:
            observe = offloading(observe, self.device)
        parts = [batch]
        if self.alone and len(batch.indices) > 1:
            parts = [collate(samples, [position], batch.layout) for position in batch.indices.tolist()]
        with frozen(self.model), torch.enable_grad():
            losses = []
            for part in parts:
                loud: dict[int, list[str]] = {}  # tensors of samples that stand out from the noise
                losses.append(self._run_rules(part.to(self.device), observe, loud))
                self._run_fallback(part, samples, observe, loud)
        if self.offload:
            finish_copies(self.device)
        return torch.cat(losses)

    def _run_rules(self, batch: Batch, observe: Observe, loud: dict[int, list[str]]) -> Tensor:
        covered = {name: p for name, p in self.operands.items() if name not in self.fallback}
        count, uses, pending = len(batch.indices), dict.fromkeys(covered, 0), {}
        forward = True

        def used(name: str) -> None:
            if forward:  # gradient checkpointing recomputes the forward inside the backward
                uses[name] += 1

        def hand_over(name: str, gradients: PerSampleGradients) -> None:
            if self._scale != 1.0:
                gradients = ScaledGradients(gradients, 1.0 / self._scale)
            if name in self.noise:
                quiet = (gradients.squared_norms() <= self.noise[name] ** 2).cpu()  # NaN is not
                for position in batch.indices.cpu()[~quiet].tolist():
                    loud.setdefault(position, []).append(name)
                return
            observe(name, gradients, batch.indices)

        def deliver(name: str, gradients: PerSampleGradients) -> None:
            if name in self.fallback:
                return
            parts = pending.setdefault(name, [])
            parts.append(gradients)
            if len(parts) == uses[name]:  # at once: what a layer's many experts keep lasts no longer than the layer
                del pending[name]
                hand_over(name, combine(parts, count))

        def uncovered(name: str, operation: str) -> None:
            self.fallback.setdefault(name, f"no rule for {operation}")

        rows = RowMap.of(batch)
        rules = Rules(rows, torch.zeros((), device=self.device, requires_grad=True), used, deliver)

        own = self._storages()

        def is_activation(tensor: Tensor) -> bool:
            shaped = tensor.is_floating_point() and tensor.ndim > 1 and rows.holds_tokens(tensor.shape[:-1])
            return shaped and tensor.untyped_storage().data_ptr() not in own

        names = {id(p): name for name, p in covered.items()}
        with ExitStack() as stack:
            stack.enter_context(followed_experts(self._experts, names, rules))
            interception = Interception(covered, rules, uncovered, is_activation)
            stack.enter_context(checkpointed_layers(self.model, interception))
            stack.enter_context(interception)
            losses = sample_losses(self.model, batch, self.loss_reduction)
            forward = False
            if losses.requires_grad:
                (losses.sum() * self._scale).backward()
        with torch.no_grad():
            for name, parts in pending.items():  # of uses that the loss does not depend on nothing comes
                if name not in self.fallback:
                    hand_over(name, combine(parts, count))
        return losses.detach().double().cpu()

    def _storages(self) -> Container[int]:
        """Addresses of what the model itself holds, which is no activation."""
        return {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}

    def _run_fallback(self, batch: Batch, samples: SampleSet, observe: Observe, loud: Mapping[int, list[str]]) -> None:
        always = [name for name in self.parameters if name in self.fallback]
        for position in batch.indices.tolist():
            names = [*always, *(name for name in loud.get(position, []) if name not in self.fallback)]
            if not names:
                continue
            single = collate(samples, [position]).to(self.device)
            for name, gradient in batch_one_gradients(self.model, names, single, self.loss_reduction, self._scale):
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / self._scale
                observe(name, DenseGradients(wide[None]), single.indices)


def batch_one_gradients(
    model: nn.Module,
    names: Sequence[str],
    batch: Batch,
    loss_reduction: LossReduction = "mean",
    loss_scale: float = 1.0,
) -> list[tuple[str, Tensor]]:
    """Plain autograd for a batch of one sample, times `loss_scale`; a tensor that no gradient reaches is left out."""
    every = dict(model.named_parameters())
    parameters = [every[name] for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            loss = sample_losses(model, batch, loss_reduction).sum() * loss_scale
            if not loss.requires_grad:
                return []
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return [(name, g.detach()) for name, g in zip(names, gradients, strict=True) if g is not None]
