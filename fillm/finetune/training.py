"""The training loop: AdamW on the mean over samples of each sample's own mean loss.

Why not `transformers.Trainer`: what this command promises is that a run killed at any moment continues to the same
weights, and that no pickle is written or read. Trainer keeps optimiser, schedule, random state and its own arguments
with `torch.save`; writes a checkpoint as several files in a folder that already carries its final name, so a kill in
between leaves one that looks whole; and averages over the tokens of a batch, where the statistics of this project take
the mean over a sample's answer tokens first. The loop below is what remains when those three are taken out.

The loss of a step is `(1/B) sum_b mean_t nll(b, t)` over the B samples of the step and the counted tokens t of each
(docs/method.md). It does not depend on how the samples are split over forward passes, so gradient accumulation,
and halving a batch for which memory is short, change nothing beyond rounding.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fillm.data import SampleSet, collate
from fillm.errors import InterruptedRun, NumericsError, OutOfMemoryError
from fillm.finetune.checkpoint import Progressed, load_checkpoint, save_checkpoint
from fillm.finetune.log import LOG_COLUMNS
from fillm.finetune.progress import TrainingProgress
from fillm.finetune.schedule import epoch_batches, rate_factor
from fillm.models import spoilt_weight
from fillm.runs import RunFolder
from fillm.runs.memory import is_out_of_memory

_BETAS = (0.9, 0.95)
_LOSS, _SAMPLES, _SECONDS = (LOG_COLUMNS.index(name) for name in ("loss", "samples", "seconds"))


@dataclass(frozen=True)
class Plan:
    """What a training does, all of it fixed before the first step.

    Attributes:
        steps: optimiser steps.
        samples_per_step: samples of one optimiser step, over all its forward passes.
        batch_size: samples of one forward pass.
        lr: peak learning rate; schedule: `cosine` or `linear`; warmup: steps.
        weight_decay: of tensors with two axes or more.
        clip_norm: longest gradient; 0 does not clip.
        target_loss: stop after an epoch whose mean loss is below; None trains all steps.
        autocast: dtype of the arithmetic; None is that of the parameters.
        seed: of sample order and dropout.
        checkpoint_every: seconds between checkpoints; 0 is after every step.
    """

    steps: int
    samples_per_step: int
    batch_size: int
    lr: float
    schedule: str
    warmup: int
    weight_decay: float
    clip_norm: float
    target_loss: float | None
    autocast: torch.dtype | None
    seed: int
    checkpoint_every: float


def sample_losses(model: nn.Module, samples: SampleSet, indices: Sequence[int], device: torch.device) -> Tensor:
    """Each sample's mean negative log-likelihood over its counted tokens, with gradient.

    Samples are padded on the right and no mask is given: under causal attention nothing that counts can see what
    stands to the right of it, and without a mask attention takes its faster path.

    Args:
        model: a causal language model.
        samples: the set that `indices` point into.
        indices: positions of B samples.
        device: where the model is.

    Returns:
        [B] float32, in nats.
    """
    batch = collate(samples, indices, layout="right").to(device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits  # [B, T, V]
    targets = batch.labels[:, 1:]  # [B, T - 1]
    counted = targets != -100
    # Only the counted positions are worth a softmax over the vocabulary.
    nll = F.cross_entropy(logits[:, :-1][counted].float(), targets[counted], reduction="none")
    row = counted.nonzero()[:, 0]
    return torch.zeros(len(indices), device=device).index_add(0, row, nll) / counted.sum(dim=1)


class Training:
    """A model, its optimiser and how far they have come.

    Args:
        model: its parameters that require grad are trained, in place; they should be float32.
        samples: what it learns.
        plan: what is done.
        folder: where the state is kept; a state that is there is continued.
        device: where the model is.
        eval_samples: their loss is measured after every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: SampleSet,
        plan: Plan,
        folder: RunFolder,
        device: torch.device,
        eval_samples: SampleSet | None = None,
    ) -> None:
        self.model, self.samples, self.plan, self.device = model, samples, plan, device
        self._eval_samples, self._folder = eval_samples, folder
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = list(self._parameters.values())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": plan.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=plan.lr, betas=_BETAS, fused=True)
        loaded = load_checkpoint(folder, self._parameters, self._optimizer)
        self.progressed = loaded or Progressed(step=0, micro_batch=plan.batch_size)
        self.steps_per_epoch = math.ceil(len(samples) / plan.samples_per_step)

    def run(self, interrupted: Callable[[], str | None], show: bool = True) -> None:
        """Trains to the end of the plan or the target loss.

        Args:
            interrupted: asked after every step; once it names a signal the state is saved and the run stops.
            show: whether progress is shown on stderr.

        Raises:
            InterruptedRun: stopped, and saved.
            NumericsError: a loss or gradient that is not finite; the last checkpoint stays.
            OutOfMemoryError: not even one sample fits.
            RunFolderError: a checkpoint could not be written.
        """
        plan, state = self.plan, self.progressed
        saved_at, saved_step, began = time.monotonic(), state.step, time.monotonic() - self.seconds
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.train()
        with torch.random.fork_rng(devices=devices), TrainingProgress(plan.steps, state.step, show) as progress:
            batches, batches_of = [], -1
            while not self.finished:
                epoch, position = divmod(state.step, self.steps_per_epoch)
                if batches_of != epoch:
                    batches = epoch_batches(self.samples.lengths, plan.samples_per_step, plan.seed, epoch)
                    batches_of = epoch
                loss, norm, rate = self._step(batches[position], progress)
                ends_epoch = position + 1 == self.steps_per_epoch or state.step + 1 == plan.steps
                measured = self.evaluate() if ends_epoch and self._eval_samples is not None else math.nan
                count = len(batches[position])
                tokens = sum(self.samples[index].num_tokens for index in batches[position])
                seconds = time.monotonic() - began
                state.step += 1
                state.log.append([state.step, epoch + 1, count, tokens, loss, rate, norm, measured, seconds])
                progress.advance(state.step, epoch + 1, count, loss)
                stop = interrupted()
                if stop or self.finished or time.monotonic() - saved_at >= plan.checkpoint_every:
                    save_checkpoint(self._folder, self._parameters, self._optimizer, state)
                    saved_at, saved_step = time.monotonic(), state.step
                if stop and not self.finished:
                    raise InterruptedRun(
                        f"stopped by {stop} after step {saved_step} of {plan.steps}, saved; continue with --resume"
                    )
        self.model.eval()

    @property
    def finished(self) -> bool:
        """All steps taken, or an epoch ended below the target loss."""
        step, target = self.progressed.step, self.plan.target_loss
        if step >= self.plan.steps:
            return True
        ended_epoch = step > 0 and step % self.steps_per_epoch == 0
        return target is not None and ended_epoch and self.epoch_losses[-1] < target

    @property
    def epoch_losses(self) -> list[float]:
        """Mean over the samples of each epoch of the loss they had when their step was taken."""
        log, losses = self.progressed.log, []
        for start in range(0, len(log), self.steps_per_epoch):
            rows = log[start : start + self.steps_per_epoch]
            losses.append(sum(row[_LOSS] * row[_SAMPLES] for row in rows) / sum(row[_SAMPLES] for row in rows))
        return losses

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.progressed.log[-1][_SECONDS] if self.progressed.log else 0.0

    def evaluate(self) -> float:
        """Mean over `eval_samples` of the sample losses, without dropout, in nats."""
        assert self._eval_samples is not None
        total = 0.0
        self.model.eval()
        order = sorted(range(len(self._eval_samples)), key=lambda i: self._eval_samples.lengths[i])
        with torch.no_grad(), self._arithmetic():
            for start in range(0, len(order), self.plan.batch_size):
                chosen = order[start : start + self.plan.batch_size]
                total += sample_losses(self.model, self._eval_samples, chosen, self.device).double().sum().item()
        self.model.train()
        return total / len(order)

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self.plan.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.plan.autocast)

    def _step(self, indices: Sequence[int], progress: TrainingProgress) -> tuple[float, float, float]:
        """One optimiser step; its mean loss, gradient norm before clipping, and learning rate."""
        plan, state = self.plan, self.progressed
        while True:
            try:
                losses = self._accumulate(indices)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                longest = max(self.samples[index].num_tokens for index in indices)
            if state.micro_batch == 1:
                raise OutOfMemoryError(
                    f"out of memory on {self.device} with a batch of 1 sample of {longest} tokens; "
                    "what may fit: a smaller --max-length, --lora-rank, --dtype bfloat16 or a smaller model"
                )
            state.micro_batch = max(1, state.micro_batch // 2)
            progress.message(f"out of memory: going on with {state.micro_batch} samples a forward pass, same result")
        if not torch.isfinite(losses).all():
            worst = indices[int((~torch.isfinite(losses)).nonzero()[0, 0])]
            # Before any step was taken, no rate is at fault.
            spoilt = spoilt_weight(self.model) if state.step == 0 else None
            remedy = (
                f"{spoilt} holds NaN or infinity: give a model whose weights are finite" if spoilt else "lower --lr"
            )
            raise NumericsError(f"{self.samples[worst].id}: loss is not finite at step {state.step + 1}; {remedy}")
        limit = plan.clip_norm if plan.clip_norm > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), limit).item()
        if not math.isfinite(norm):
            bad = [n for n, p in self._parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
            where = bad[0] if bad else "the norm over all tensors"
            first = self.samples[indices[0]].id
            raise NumericsError(
                f"{where}: gradient is not finite at step {state.step + 1} (samples {first}, ...); lower --lr"
            )
        rate = plan.lr * rate_factor(state.step, plan.steps, plan.warmup, plan.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        return losses.double().mean().item(), norm, rate

    def _accumulate(self, indices: Sequence[int]) -> Tensor:
        """Gradients of a step's mean loss into `.grad`; the losses of its samples, [len(indices)]."""
        for parameter in self._parameters.values():
            # Zeros rather than None: a tensor that one batch does not reach is still decayed and stepped like the rest.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        losses = []
        for start in range(0, len(indices), self.progressed.micro_batch):
            chosen = indices[start : start + self.progressed.micro_batch]
            torch.manual_seed(_dropout_seed(self.plan.seed, self.progressed.step, start))
            with self._arithmetic():
                each = sample_losses(self.model, self.samples, chosen, self.device)
            (each.sum() / len(indices)).backward()
            losses.append(each.detach())
        return torch.cat(losses)


def _dropout_seed(seed: int, step: int, start: int) -> int:
    """A seed a forward pass: dropout then needs no random state in the checkpoint."""
    return (seed * 1_000_003 + step) * 1_000_003 + start & (1 << 63) - 1
