"""From a model, a mask and two sets to a model that has forgotten, and the measurements beside it."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fillm.capture import frozen
from fillm.data import Reading, Row, SampleSet
from fillm.errors import DataError, InterruptedRun, NumericsError
from fillm.masks import Mask
from fillm.models import quiet_transformers, spoilt_weight, with_lora
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.runs import signals_noted
from fillm.runs.processes import Processes
from fillm.runs.state_files import writing
from fillm.unlearn.alternatives import read_refusals, with_refusals
from fillm.unlearn.choosing import adapted_modules
from fillm.unlearn.config import INFLUENCE, TASK_VECTOR, UnlearnConfig
from fillm.unlearn.evaluation import arithmetic, evaluate
from fillm.unlearn.followed import Folder
from fillm.unlearn.freezing import frozen_outside
from fillm.unlearn.gradients import REMEDY
from fillm.unlearn.influence import OneShot, masked_update, predicted, take_step
from fillm.unlearn.losses import UnlearnLoss
from fillm.unlearn.masked_optimizer import MaskedOptimizer
from fillm.unlearn.plan import loss_of, plan_of, savings_lines, trained_mask
from fillm.unlearn.reference import ReferenceCache
from fillm.unlearn.results import UnlearnResult
from fillm.unlearn.selected import SelectedEntries
from fillm.unlearn.sophia import Sophia
from fillm.unlearn.sources import Sources
from fillm.unlearn.stopping import Evaluation
from fillm.unlearn.task_vector import negate
from fillm.unlearn.training import Unlearning
from fillm.unlearn.untouched import Untouched

HARDLY_MOVED = 0.01  # nat per answer token; less of a rise is told
_START = "start"  # the stage that holds the losses before the first step


@dataclass
class Job:
    """All that a run works on.

    Attributes:
        config: resolved.
        model: changed in place.
        dtypes: by parameter, the type that it is saved in; others keep their own.
        fingerprint: of the model.
        mask: what may change.
        reaches: of every forget sample the tensors of its own mask, or None.
        updates: `u` of the ranking, for `influence`.
        rows: of the forget set, for refusals.
        tokenizer: of the model; None where all rows carry tokens.
        forget, retain: the sets.
        evaluated: the retain samples that evaluations take.
        folder: of the run.
        processes: of the run.
        console: where to speak.
        show: whether progress is shown.
        interrupted: names the signal that has come to one of several processes before the training.
    """

    config: UnlearnConfig
    model: nn.Module
    dtypes: Mapping[str, torch.dtype]
    fingerprint: str
    mask: Mask
    reaches: Sequence[frozenset[str]] | None
    updates: Mapping[str, Tensor] | None
    rows: list[Row]
    tokenizer: Any
    forget: SampleSet
    retain: SampleSet
    evaluated: SampleSet
    folder: Folder
    processes: Processes
    console: Console
    show: bool
    interrupted: Callable[[], str | None] = lambda: None

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of the arithmetic; None is that of the weights."""
        return torch.bfloat16 if self.config.mixed_precision == "bf16" else None

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Mean losses of the forget set and of the evaluated retain samples, the same in every process."""
        forget, retain = self.losses(model)
        return float(forget.mean()), float(retain.mean())

    def losses(self, model: nn.Module) -> list[torch.Tensor]:
        """Every sample's loss of both sets, float64 on the CPU, the same in every process."""
        size = -(-self.config.batch_size // self.processes.count)
        sets = (self.forget, self.evaluated)
        return [evaluate(model, samples, self.processes, size, self.autocast) for samples in sets]


def carry_out(job: Job) -> UnlearnResult:
    """Unlearns, and checks what became of the model.

    Raises:
        FillmError: one line.
        NumericsError: the losses of what would be saved are not finite.
        RuntimeError: a weight outside the mask has moved: a fault of this program, and nothing is saved.
    """
    model = job.model
    # What cannot be is refused here, before anything is kept that would have to be resumed.
    way = _prepared_step(job) if job.config.loss == INFLUENCE else _prepared_training(job)
    # Several processes end at their meetings, one at once where it has nothing to save.
    with frozen(model), signals_noted() if job.processes.count > 1 else nullcontext(lambda: None) as job.interrupted:
        untouched = Untouched.before(model, job.mask)
        before = _start(job)
        outcome = way(before)
        _as_saved(model, job.dtypes)
        verification = untouched.verify(model)
        if not verification.outside_mask_bit_equal:
            raise RuntimeError(f"weights outside the mask have moved, of {', '.join(verification.differing[:3])}")
        if not verification.mask_applied:
            job.console.warn("no selected weight has changed: the model is the one that was given")
        after = Evaluation(outcome.kept, *job.measure(model))
        if not (math.isfinite(after.forget) and math.isfinite(after.retain)):
            step = "lower --eta" if job.config.loss == INFLUENCE else REMEDY
            raise NumericsError(
                f"forget and retain loss are {after.forget} and {after.retain} after the last step; {step}"
            )
        if verification.mask_applied and not outcome.stopped:
            _tell_of_little(job, before.forget, after.forget)
    return UnlearnResult(
        model=model,
        mask=job.mask,
        verification=verification,
        before=before,
        after=after,
        steps=outcome.steps,
        stopped=outcome.stopped,
        one_shot=outcome.one_shot,
        log=outcome.log,
        savings=outcome.savings,
        seconds=outcome.seconds,
    )


def _tell_of_little(job: Job, before: float, after: float) -> None:
    """Warns where the forget loss has hardly risen, with the option that makes it rise more."""
    if after - before >= HARDLY_MOVED:
        return
    more = "--eta" if job.config.loss in (INFLUENCE, TASK_VECTOR) else "--lr, or more --epochs,"
    job.console.warn(
        f"forget loss {before:.4f} before and {after:.4f} after: next to nothing is forgotten; a larger {more} "
        "forgets more"
    )


@torch.no_grad()
def _as_saved(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Rounds weights that were widened to what is saved: that, and no finer model, is verified and measured."""
    for name, parameter in model.named_parameters():
        if (dtype := dtypes.get(name, parameter.dtype)) != parameter.dtype:
            parameter.copy_(parameter.to(dtype))


@dataclass(frozen=True)
class _Outcome:
    """What a way of unlearning tells: see `UnlearnResult`; `kept` is the step whose weights the model has."""

    kept: int
    steps: int
    stopped: str
    one_shot: OneShot | None
    log: list[list[float]]
    savings: dict[str, int | None]
    seconds: float


def _start(job: Job) -> Evaluation:
    """The losses before the first step, measured once a run."""
    saved = job.folder.load_stage(_START) if job.processes.first else None
    if not job.processes.meet(int(saved is not None))[0][0]:
        found = job.losses(job.model)
        for samples, each in zip((job.forget, job.evaluated), found, strict=True):
            if (bad := (~each.isfinite()).nonzero()).numel():
                spoilt, at = spoilt_weight(job.model), int(bad[0])
                cause = f": {spoilt} holds NaN or infinity; give a model whose weights are finite" if spoilt else ""
                told = f"the loss of sample {samples[at].id} is {float(each[at])}"
                raise NumericsError(f"{told} before the first step{cause}")
        losses = torch.stack([each.mean() for each in found])
        job.folder.save_stage(_START, {"losses": losses}, {})
    else:
        losses = torch.zeros(2, dtype=torch.float64) if saved is None else saved[0]["losses"]
        job.processes.add_up_in_order(losses)
    forget, retain = losses.tolist()
    return Evaluation(0, forget, retain)


def _prepared_step(job: Job) -> Callable[[Evaluation], _Outcome]:
    return partial(_one_step, job, masked_update(job.model, job.mask, job.updates))


def _one_step(job: Job, update: Mapping[str, Tensor], before: Evaluation) -> _Outcome:
    passes = Passes(
        job.console,
        folder=job.folder if job.processes.first else None,  # what it has saved is a part of the sum of all
        checkpoint_seconds=job.config.checkpoint_every or 1e-9,
        processes=job.processes,
    )
    with passes.stopping():
        one_shot = predicted(job.model, update, job.forget, job.evaluated, job.config.eta, passes)
    take_step(SelectedEntries(job.model, job.mask), update, job.mask, one_shot.eta)
    return _Outcome(1, 0, "", one_shot, [], {}, 0.0)


def _prepared_training(job: Job) -> Callable[[Evaluation], _Outcome]:
    config = job.config
    loss = loss_of(config)
    loss.check(job.model)
    alternatives = _alternatives(job) if loss.uses_alternatives else None
    targets = None if config.lora_rank is None else adapted_modules(job.model, job.mask)
    return partial(_train, job, loss, alternatives, targets)


def _train(
    job: Job, loss: UnlearnLoss, alternatives: SampleSet | None, targets: list[str] | None, before: Evaluation
) -> _Outcome:
    config = job.config
    sources = _sources(job, loss, alternatives)
    trained, mask, parameters = job.model, job.mask, sum(p.numel() for p in job.model.parameters())
    if targets is not None:
        trained = with_lora(job.model, int(config.lora_rank or 0), config.seed, targets).to(job.processes.device)
        mask = trained_mask(trained)
    with ExitStack() as stack:
        freezing = stack.enter_context(frozen_outside(trained, mask))
        entries = SelectedEntries(trained, mask)
        start = entries.take() if config.loss == TASK_VECTOR else {}
        plan = plan_of(config, len(job.forget))
        measure = partial(job.measure, trained)
        training = Unlearning(
            trained,
            loss,
            sources,
            _optimizer(config, trained, mask),
            entries,
            plan,
            job.folder,
            job.processes,
            measure,
            job.reaches,
        )
        for line in savings_lines(freezing.savings, trained, mask, parameters):
            job.console.note(line)
        with signals_noted() as interrupted:
            kept = training.run(before, lambda: job.interrupted() or interrupted(), job.show)
        if config.loss == TASK_VECTOR:
            negate(entries, start, float(config.eta or 0.0))
    if targets is not None:
        _merge(job, trained)
    state = training.progressed
    return _Outcome(kept.step, state.step, state.stopped, None, state.log, freezing.savings, training.seconds)


def _optimizer(config: UnlearnConfig, model: nn.Module, mask: Mask) -> MaskedOptimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = Sophia if config.optimizer == "sophia" else torch.optim.AdamW
    optimizer = kind([group for group in groups if group["params"]], lr=config.lr)
    return MaskedOptimizer(optimizer, mask, model, master_weights=True)


def _alternatives(job: Job) -> SampleSet:
    """The forget samples with refusals for answers, position by position."""
    config = job.config
    rows = with_refusals(job.rows, job.forget, read_refusals(config.idk), config.seed)
    found = Reading(config, job.console.warn).samples(rows, job.tokenizer, "--forget", source="refusals")
    if len(found) != len(job.forget):
        raise DataError("--max-length leaves no room for some refusals; raise it, or give shorter ones with --idk")
    return found


def _sources(job: Job, loss: UnlearnLoss, alternatives: SampleSet | None) -> Sources:
    """The samples of both terms; what the loss needs of the untouched model is recorded by the first process."""
    sets = {"forget": job.forget, "retain": job.retain, "alternatives": alternatives}

    def open_all(progress: Callable[[int], None] | None = None) -> dict[str, ReferenceCache]:
        with arithmetic(job.processes.device, job.autocast):
            return {
                name: ReferenceCache.make(
                    job.folder.partial / f"reference-{name}",
                    job.model,
                    sets[name],
                    recorded,
                    fingerprint=job.fingerprint,
                    notice=job.console.note,
                    progress=progress,
                )
                for name, recorded in loss.needs.items()
            }

    if job.processes.first:
        caches = open_all(lambda done: _go_on(job))
        job.processes.meet(0)
        return Sources(job.forget, job.retain, alternatives, caches)
    while _go_on(job):
        pass
    return Sources(job.forget, job.retain, alternatives, open_all())


def _go_on(job: Job) -> bool:
    """At a meeting while the first process records: whether it goes on.

    Raises:
        InterruptedRun: a process was told to stop; what is recorded stays.
    """
    signal = job.interrupted()
    heard = job.processes.meet(int(job.processes.first), int(signal is not None))
    if heard[0][0] and any(words[1] for words in heard):
        told = signal or "a signal to another process"
        job.processes.end(InterruptedRun(f"stopped by {told} before the first step; continue with --resume"))
    return bool(heard[0][0])


def _merge(job: Job, trained: Any) -> None:
    """Adds the adapters to the weights they stand beside; a copy of them is kept for the run's folder."""
    if job.processes.first:
        shutil.rmtree(adapter_folder(job.folder), ignore_errors=True)
        with writing(adapter_folder(job.folder)), quiet_transformers():
            trained.save_pretrained(adapter_folder(job.folder))
    trained.merge_and_unload()
    job.model.requires_grad_(False)


def adapter_folder(folder: Folder) -> Path:
    """Where adapters that were trained wait for the run to finish."""
    return folder.partial / "adapter"
