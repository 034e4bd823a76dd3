"""The unlearning loop: a forget batch and a retain batch a step, inside a mask.

Why not `transformers.Trainer`, nor the optimiser and model wrappers of accelerate: what this command promises is that a
run killed at any moment continues to the same weights, that no pickle is written or read, and that the mean of a step
is over samples, however they are dealt out. Trainer keeps optimiser, schedule and random state with `torch.save`, in
folders that carry their final name before they are whole, and averages over the tokens of a batch; a wrapped model
averages over processes what was a mean over unequal parts. `fillm.MaskCallback` is for those who train with Trainer.

The model is in eval mode: what the untouched model is compared with has no dropout either.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fillm.capture.experts import replaced_forward
from fillm.capture.losses import answer_logits
from fillm.data import collate
from fillm.errors import InterruptedRun, NumericsError
from fillm.finetune.progress import TrainingProgress
from fillm.finetune.schedule import rate_factor
from fillm.runs.processes import Processes
from fillm.unlearn.checkpoint import LOG_COLUMNS, Progressed, load_checkpoint, save_checkpoint
from fillm.unlearn.evaluation import arithmetic
from fillm.unlearn.followed import Folder
from fillm.unlearn.gradients import REMEDY, StepGradients
from fillm.unlearn.losses import UnlearnLoss
from fillm.unlearn.masked_optimizer import MaskedOptimizer
from fillm.unlearn.sampling import StepSamples, steps_per_epoch
from fillm.unlearn.selected import SelectedEntries
from fillm.unlearn.sources import Sources
from fillm.unlearn.stopping import Evaluation, StoppingRule

_SECONDS = LOG_COLUMNS.index("seconds")


@dataclass(frozen=True)
class Plan:
    """What an unlearning does, all of it fixed before the first step.

    Attributes:
        steps: optimiser steps at most.
        samples_per_step: forget samples of one step over all forward passes and processes, and as many retain samples.
        batch_size: samples of one forward pass, over all processes.
        lr: peak learning rate; schedule: `cosine` or `linear`; warmup: steps.
        clip_norm: longest gradient inside the mask; 0 does not clip.
        eval_every: steps between evaluations; the last step is followed by one in any case.
        rule: when to stop, and what to keep.
        autocast: type of the arithmetic; None is that of the weights.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of the order of samples.
        checkpoint_every: seconds between checkpoints; infinity keeps none.
    """

    steps: int
    samples_per_step: int
    batch_size: int
    lr: float
    schedule: str
    warmup: int
    clip_norm: float
    eval_every: int
    rule: StoppingRule
    autocast: torch.dtype | None
    gradient_checkpointing: bool
    seed: int
    checkpoint_every: float


class Unlearning:
    """A model, its masked optimiser and how far they have come.

    Args:
        model: only tensors of the mask require grad; changed in place, and left in eval mode.
        loss: what is minimised.
        sources: its samples.
        optimizer: steps what the mask selects.
        entries: what the mask selects.
        plan: what is done.
        folder: where the state is kept; a state that is there is continued.
        processes: of the run.
        evaluate: measures both losses, in all processes at once.
        reaches: as of `StepGradients`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: UnlearnLoss,
        sources: Sources,
        optimizer: MaskedOptimizer,
        entries: SelectedEntries,
        plan: Plan,
        folder: Folder,
        processes: Processes,
        evaluate: Callable[[], tuple[float, float]],
        reaches: Sequence[frozenset[str]] | None = None,
    ) -> None:
        self.model, self.loss, self.sources, self.plan = model, loss, sources, plan
        self._optimizer, self._entries, self._folder = optimizer, entries, folder
        self._processes, self._evaluate = processes, evaluate
        self.progressed = load_checkpoint(folder, entries, optimizer) or Progressed(step=0)
        processes.agree(f"step {self.progressed.step}")  # the others have read it from the first one's folder
        share = -(-plan.batch_size // processes.count)
        self._gradients = StepGradients(
            model, loss, sources, processes, min(share, self.progressed.limit or share), plan.autocast, reaches
        )
        self._samples = StepSamples(sources.forget.lengths, len(sources.retain), plan.samples_per_step, plan.seed)
        self.steps_per_epoch = steps_per_epoch(len(sources.forget), plan.samples_per_step)

    def run(self, start: Evaluation, interrupted: Callable[[], str | None], show: bool = True) -> Evaluation:
        """Unlearns to the end of the plan or a bound of its rule, and puts the best weights back.

        Args:
            start: the losses before the first step.
            interrupted: asked after every step; once it names a signal the state is saved and the run stops.
            show: whether progress is shown on stderr.

        Returns:
            The evaluation whose weights the model now has.

        Raises:
            InterruptedRun: stopped, and saved.
            NumericsError: a loss or gradient that is not finite; the last checkpoint stays.
            OutOfMemoryError: not even one sample fits.
            RunFolderError: a checkpoint could not be written.
        """
        plan, state = self.plan, self.progressed
        if not state.evaluations:
            self._note(start)
        saved_at, began = time.monotonic(), time.monotonic() - self.seconds
        self.model.eval()
        with self._recomputing(), TrainingProgress(plan.steps, state.step, show) as progress:
            while not self.finished:
                row = self._step(progress)
                state.step += 1
                if state.step % plan.eval_every == 0 or state.step == plan.steps:
                    forget, retain = self._evaluate()
                    self._note(Evaluation(state.step, forget, retain))
                    row[LOG_COLUMNS.index("forget_loss")], row[LOG_COLUMNS.index("retain_loss")] = forget, retain
                    if show:
                        progress.message(f"step {state.step}: forget loss {forget:.4f}, retain loss {retain:.4f}")
                row[_SECONDS] = time.monotonic() - began
                state.log.append(row)
                progress.advance(state.step, int(row[1]), int(row[2]), row[4])
                stop, due = self._agreed(interrupted(), time.monotonic() - saved_at >= plan.checkpoint_every)
                state.limit = self._gradients.limit or state.limit
                if (stop or due or self.finished) and plan.checkpoint_every < math.inf:
                    save_checkpoint(self._folder, self._entries, self._optimizer, state)
                    saved_at = time.monotonic()
                if stop and not self.finished:
                    saved = f"after step {state.step} of {plan.steps}, saved; continue with --resume"
                    self._processes.end(InterruptedRun(f"stopped by {stop} {saved}"))
        self._agree_on_weights()
        best = plan.rule.best(state.evaluations)
        if state.best is not None:
            self._entries.put(state.best)
        return best

    @property
    def finished(self) -> bool:
        """All steps taken, or a bound met."""
        return bool(self.progressed.stopped) or self.progressed.step >= self.plan.steps

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.progressed.log[-1][_SECONDS] if self.progressed.log else 0.0

    def _note(self, evaluation: Evaluation) -> None:
        """Takes an evaluation of the present weights to the record; they are kept if they are the best."""
        state, rule = self.progressed, self.plan.rule
        before = rule.best(state.evaluations) if state.evaluations else None
        state.evaluations.append(evaluation)
        state.stopped = rule.reason(evaluation) or ""
        if rule.bounded and rule.best(state.evaluations) != before:
            state.best = self._entries.take()

    def _agree_on_weights(self) -> None:
        """Every process has stepped the same gradients; that they came to the same bits is looked at, not believed."""
        digest = hashlib.sha256()
        for values in self._entries.take().values() if self._processes.count > 1 else ():
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
        self._processes.agree(digest.hexdigest())

    def _agreed(self, signal: str | None, due: bool) -> tuple[str | None, bool]:
        """Whether any process was told to stop, and whether the first finds a checkpoint due: the same for all."""
        heard = self._processes.meet(int(signal is not None), int(due))
        told = any(words[0] for words in heard)
        return (signal or "a signal to another process") if told else None, bool(heard[0][1])

    def _step(self, progress: TrainingProgress) -> list[float]:
        """One optimiser step; its row of the log, without what an evaluation adds."""
        plan, step, sources = self.plan, self.progressed.step, self.sources
        forget = self._samples.forget(step)
        retain = self._samples.retain(step) if self.loss.uses_retain else []
        self._estimate_curvature(forget)
        of_forget, of_retain = self._gradients.form(forget, retain, step + 1, progress.message)
        norm = float(self._optimizer.clip_grad_norm_(plan.clip_norm or math.inf))
        if not math.isfinite(norm):
            where = self._gradients.first_not_finite()
            raise NumericsError(f"{where}: gradient is not finite at step {step + 1}; {REMEDY}")
        rate = plan.lr * rate_factor(step, plan.steps, plan.warmup, plan.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        seen = [*(sources.forget[i] for i in forget), *(sources.retain[i] for i in retain)]
        tokens = sum(sample.num_tokens for sample in seen)
        objectives = [of_forget / len(forget), of_retain / len(retain) if retain else math.nan]
        epoch = 1 + step // self.steps_per_epoch
        return [step + 1, epoch, len(seen), tokens, *objectives, rate, norm, math.nan, math.nan, math.nan]

    def _estimate_curvature(self, forget: Sequence[int]) -> None:
        """Before the steps that want one (Sophia): one sample a pass, so the same however a step is cut up or dealt."""
        if not self._optimizer.due:
            return
        device, autocast = self._processes.device, self.plan.autocast
        drawn = torch.Generator(device).manual_seed(self.plan.seed * 1_000_003 + self.progressed.step)

        def logits(position: int) -> Tensor:
            with arithmetic(device, autocast):
                return answer_logits(self.model, collate(self.sources.forget, [position]).to(device))[0]

        try:
            self._optimizer.estimate([partial(logits, position) for position in forget], drawn)
        except Exception as error:
            if self._processes.count == 1:
                raise
            self._processes.abandon(error)  # the others are at no meeting, but average their estimates

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Gradient checkpointing of the model's blocks in eval mode, where transformers would leave it out."""
        with ExitStack() as stack:
            for module in self.model.modules() if self.plan.gradient_checkpointing else ():
                if isinstance(module, GradientCheckpointingLayer):
                    again: Any = partial(checkpoint, module.forward, use_reentrant=False)
                    stack.enter_context(replaced_forward(module, again))
            yield
