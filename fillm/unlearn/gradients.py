"""The gradient of a step's loss, from forward passes of any size in any number of processes.

    gamma * (1/B) sum_b forget(b) + alpha * (1/R) sum_r retain(r)           over B forget and R retain samples

The values of samples do not depend on their batch mates, so neither how they are split over forward passes and
processes nor a batch halved for want of memory changes the gradient, but for rounding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fillm.data import SampleSet
from fillm.errors import NumericsError, OutOfMemoryError, UsageError
from fillm.runs.memory import is_out_of_memory
from fillm.runs.processes import Processes
from fillm.unlearn.evaluation import arithmetic
from fillm.unlearn.losses import UnlearnLoss
from fillm.unlearn.sources import Sources

REMEDY = "lower --lr, or stop earlier with --stop-forget-loss"
ValuesOf = Callable[[Sequence[int], torch.device], Tensor]


class StepGradients:
    """Forms gradients into `.grad`.

    Args:
        model: a causal language model; its parameters that require grad get a gradient.
        loss: of two terms.
        sources: its samples.
        processes: each forms its part; the parts are added up in their order.
        micro_batch: samples of one forward pass of this process; halved where memory runs out.
        autocast: type of the arithmetic; None is that of the weights.
        reaches: of every forget sample, the tensors that its gradient is for; None where it is for all. Samples for the
            same tensors share forward passes, others are run apart.

    Attributes:
        limit: samples of a forward pass that memory has forced in this process; None where it has not.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: UnlearnLoss,
        sources: Sources,
        processes: Processes,
        micro_batch: int,
        autocast: torch.dtype | None = None,
        reaches: Sequence[frozenset[str]] | None = None,
    ) -> None:
        self.parameters: Mapping[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.micro_batch = micro_batch
        self.limit: int | None = None
        self._model, self._loss, self._sources, self._processes = model, loss, sources, processes
        self._autocast, self._reaches = autocast, reaches

    def form(
        self, forget: Sequence[int], retain: Sequence[int], step: int, message: Callable[[str], None]
    ) -> tuple[float, float]:
        """The gradient of a step's loss, the same in every process.

        Args:
            forget: positions of the step's forget samples, of all processes.
            retain: of its retain samples; empty where the loss has no use for them.
            step: its number, from 1, for messages.
            message: told when a batch is halved.

        Returns:
            Sums of the forget and of the retain values.

        Raises:
            NumericsError: a value that is not finite, with the sample.
            UsageError: a loss that depends on none of the weights that may change.
            OutOfMemoryError: not even one sample fits.
        """
        error, sums = None, torch.zeros(2, dtype=torch.float64)
        try:
            sums = self._own(forget, retain, step, message)
        except Exception as caught:  # raised where all processes are: they would wait for this one's gradients
            error = caught
        self._processes.meet(error=error)
        self._processes.add_up_all([*(parameter.grad for parameter in self.parameters.values()), sums])
        of_forget, of_retain = sums.tolist()
        return of_forget, of_retain

    def _own(self, forget: Sequence[int], retain: Sequence[int], step: int, message: Callable[[str], None]) -> Tensor:
        """`_accumulate` with forward passes of as many samples as fit."""
        while True:
            try:
                return self._accumulate(forget, retain, step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve([self._sources.forget[i].num_tokens for i in forget], message)

    def first_not_finite(self) -> str:
        """The tensor whose gradient holds NaN or infinity."""
        bad = (name for name, p in self.parameters.items() if not bool(torch.isfinite(p.grad).all()))
        return next(bad, "the norm over all tensors")

    def _accumulate(self, forget: Sequence[int], retain: Sequence[int], step: int) -> Tensor:
        """This process's part of the gradient, and the sums of both terms' values over its samples, [2]."""
        for parameter in self.parameters.values():
            # Zeros rather than None: a tensor that one batch does not reach is still decayed and stepped like the rest.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        of_forget = partial(self._sources.forget_values, self._loss, self._model)
        of_retain = partial(self._sources.retain_values, self._loss, self._model)
        own, factor = self._processes.share(forget), self._loss.gamma / len(forget)
        total, kept = 0.0, 0.0
        if self._reaches is None:
            total = self._backward(of_forget, self._sources.forget, own, factor, step)
        else:
            alike: dict[frozenset[str], list[int]] = {}
            for position in own:
                alike.setdefault(self._reaches[position], []).append(position)
            for names, positions in alike.items():
                with self._reaching(names):
                    total += self._backward(of_forget, self._sources.forget, positions, factor, step)
        if retain:
            own, factor = self._processes.share(retain), self._loss.alpha / len(retain)
            kept = self._backward(of_retain, self._sources.retain, own, factor, step)
        return torch.tensor([total, kept], dtype=torch.float64)

    def _backward(
        self, values_of: ValuesOf, samples: SampleSet, positions: Sequence[int], factor: float, step: int
    ) -> float:
        """Adds the gradient of `factor` times the sum of the values at `positions`; that sum."""
        total = 0.0
        for begin in range(0, len(positions), self.micro_batch):
            chosen = positions[begin : begin + self.micro_batch]
            with arithmetic(self._processes.device, self._autocast):
                values = values_of(chosen, self._processes.device)
            finite = torch.isfinite(values)
            if not bool(finite.all()):
                worst = samples[chosen[int((~finite).nonzero()[0, 0])]].id
                raise NumericsError(f"{worst}: loss is not finite at step {step}; {REMEDY}")
            if values.requires_grad:
                (values.sum() * factor).backward()
            elif self._reaches is None:  # a sample's own mask may hold nothing that its loss depends on
                raise UsageError(
                    "the loss depends on no selected weight: select some that it does (rmu: at or below --rmu-layer)"
                )
            total += float(values.detach().double().sum())
        return total

    def _halve(self, lengths: Sequence[int], message: Callable[[str], None]) -> None:
        if self.micro_batch == 1:
            raise OutOfMemoryError(
                f"out of memory on {self._processes.device} with a forward pass of 1 sample of up to {max(lengths)} "
                "tokens; what may fit: --gradient-checkpointing, a smaller --max-length, --mixed-precision bf16, a "
                "smaller mask"
            )
        self.micro_batch = self.limit = max(1, self.micro_batch // 2)
        message(f"out of memory: going on with {self.micro_batch} samples a forward pass, same result")

    @contextmanager
    def _reaching(self, names: frozenset[str]) -> Iterator[None]:
        """Only the tensors of some samples' own mask take their gradient."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        try:
            yield
        finally:
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
