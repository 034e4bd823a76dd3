"""Exact Gram matrices of every tensor's per-sample gradients: passes over both sets, a group of tensors at a time."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fillm.capture import Capture
from fillm.data import SampleSet
from fillm.errors import InterruptedRun, NumericsError
from fillm.rank.dealt_grams import grams_of, spread
from fillm.rank.gram_groups import Group, gram_groups
from fillm.rank.passes import Passes
from fillm.statistics import KeptGradients, TensorGram

_PARTS = ("forget", "cross", "retain", "retain_rows", "forget_rows")


def exact_grams(
    passes: Passes, capture: Capture, forget: SampleSet, retain: SampleSet, memory_bytes: int
) -> Iterator[TensorGram]:
    """The Gram matrices (7) of docs/method.md, exact and uncompressed, of every tensor of `capture`, in its order.

    Args:
        passes: how passes are run. Finished groups go to its run folder, if it has one, at the pace of its checkpoints.
        capture: of the tensors in scope.
        forget: `m` samples.
        retain: `n` samples.
        memory_bytes: for the gradients that are kept, in factored form where that is smaller, by all processes
            together; what a batch takes, the block of rows in hand (64 MiB, or one row of all samples) and the matrices
            themselves come on top.

    Yields:
        One `TensorGram` a tensor; all zero where no gradient arrives.

    Raises:
        NumericsError: naming a sample and tensor whose gradient is not finite.
        UsageError: if a tensor alone exceeds the memory, with what would do.
    """
    finished = _Finished(passes)
    yield from finished.load(capture, (len(forget), len(retain)))
    memory_bytes = min(least for (least,) in passes.processes.meet(memory_bytes))  # groups are the same in all
    left = [name for name in capture.parameters if name not in finished.names]
    groups = gram_groups(passes, capture, left, (forget, retain), memory_bytes)
    for number, group in enumerate(groups, start=1):
        of = f"group {number} of {len(groups)}" if len(groups) > 1 else ""
        stage = f"gram-{len(finished.names) + 1}"  # the place of the group's first tensor
        try:
            grams = _group(passes, capture, group, {"forget": forget, "retain": retain}, stage, of)
        except InterruptedRun:
            finished.save(capture)
            raise
        for gram in grams:
            finished.add(gram)
        if finished.due():
            finished.save(capture)
        yield from grams


def _group(
    passes: Passes, capture: Capture, group: Group, sets: dict[str, SampleSet], stage: str, of: str
) -> list[TensorGram]:
    restricted, kept = capture.like(group.names), {}
    for which, samples in sets.items():
        kept[which] = KeptGradients(group.formed)
        label = f"{which} pass" + (f", {of}" if of else "")
        passes.run(f"{stage}-{which}", label, restricted, samples, kept[which])
        passes.losses.setdefault(which, passes.losses[f"{stage}-{which}"])
    capture.fallback |= restricted.fallback
    out = []
    for gram in grams_of(passes, capture, group.names, kept, sets):
        _check_finite(gram, sets)
        out.append(gram)
    return out


def _check_finite(gram: TensorGram, sets: dict[str, SampleSet]) -> None:
    for which, samples in sets.items():
        spoilt = (~getattr(gram, which).diagonal().isfinite()).nonzero()
        if spoilt.numel():
            sample = samples[int(spoilt[0, 0])].id
            raise NumericsError(f"the gradient of sample {sample} with respect to {gram.name} is not finite")


@dataclass
class _Finished:
    """Gram matrices that a resumed run need not compute again, in numbered stages of the run folder.

    Attributes:
        names: tensors that are done.
        waiting: those among them that no stage holds yet.
        stages: number of stages written.
    """

    passes: Passes
    names: set[str] = field(default_factory=set)
    waiting: list[TensorGram] = field(default_factory=list)
    stages: int = 0

    def __post_init__(self) -> None:
        folder = self.passes.folder
        # As in Passes.run: what is too short to be saved must not cost a later pass its state.
        self._saves = folder is not None and folder.load_state() is None
        self._last_save = time.monotonic()

    def load(self, capture: Capture, sizes: tuple[int, int]) -> Iterator[TensorGram]:
        """What an earlier run has saved: the first process reads it, and tells the others.

        Args:
            capture: that learns which tensors took batch-1 autograd.
            sizes: samples of the forget and of the retain set.
        """
        processes, folder = self.passes.processes, self.passes.folder
        while True:
            tensors, meta = (folder.load_stage(self._stage()) if folder is not None else None) or ({}, None)
            meta = json.loads(processes.tell(json.dumps(meta))[0])
            if meta is None:
                return
            self.stages += 1
            capture.fallback |= meta["fallback"]
            for which, size in zip(("forget", "retain"), sizes, strict=True):
                losses = tensors.get(f"losses/{which}", torch.empty(size, dtype=torch.float64))
                processes.spread(losses, 0)
                self.passes.losses.setdefault(which, losses)
            for name, numel in meta["numels"]:
                self.names.add(name)
                gram = None
                if tensors:
                    gram = TensorGram(name, numel, **{part: tensors.get(f"{part}/{name}") for part in _PARTS})
                yield spread(processes, gram, name, numel, sizes, 0)

    def add(self, gram: TensorGram) -> None:
        """Notes a tensor; held until it is saved, where there is a folder."""
        self.names.add(gram.name)
        if self._saves:
            self.waiting.append(gram)

    def due(self) -> bool:
        """Whether as much work as may be lost waits to be saved."""
        return time.monotonic() - self._last_save >= self.passes.checkpoint_seconds

    def save(self, capture: Capture) -> None:
        """Writes what waits as the next stage."""
        if not self.waiting:
            return
        tensors: dict[str, Tensor] = {f"losses/{which}": self.passes.losses[which] for which in ("forget", "retain")}
        for gram in self.waiting:
            for part in _PARTS:
                if (value := getattr(gram, part)) is not None:
                    tensors[f"{part}/{gram.name}"] = value
        meta = {"numels": [[gram.name, gram.numel] for gram in self.waiting], "fallback": capture.fallback}
        self.passes.folder.save_stage(self._stage(), tensors, meta)
        self.stages, self.waiting, self._last_save = self.stages + 1, [], time.monotonic()

    def _stage(self) -> str:
        return f"grams-{self.stages + 1}"
