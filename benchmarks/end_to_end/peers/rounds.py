"""Makes the peers, lets each choose its batches, and runs them in rounds."""

import copy
import dataclasses
import gc
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.end_to_end.peers.registry import ALL, FEW, PLAIN, SOME, Peer
from benchmarks.end_to_end.peers.setting import Absent, Ready, Setting
from benchmarks.end_to_end.results import Row, spread_of
from benchmarks.end_to_end.workload import Workload, spread
from fillm.data import SampleSet
from fillm.errors import FillmError, UsageError

MEASURED = (
    "key", "what", "computes", "package", "version", "samples", "tokens_per_batch", "rounds",
    "seconds_per_sample", "seconds_per_sample_min", "seconds_per_sample_max",
    "over_plain", "over_plain_min", "over_plain_max", "covered", "extra_bytes", "note",
)  # fmt: skip
TUNING_RUNS = 2  # of every budget; the least counts, so that the first may be slow


@dataclass
class Entry:
    """One peer in a run.

    Attributes:
        peer: which.
        setting: what it was given.
        ready: None where it does not run.
        tokens: of its batches.
        seconds: a sample, of every round.
        why: it does not run.
    """

    peer: Peer
    setting: Setting
    ready: Ready | None = None
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    why: str = ""

    @property
    def num_samples(self) -> int:
        """Of both sets."""
        return len(self.setting.forget) + len(self.setting.retain)


def settings_of(peer: Peer, work: Workload, some: int, few: int, folder: Path) -> Setting:
    """A peer's own copy of the model and its samples, which have the lengths of all."""
    count = {ALL: len(work.forget) + len(work.retain), SOME: some, FEW: few}[peer.samples]
    forget, retain = portion(work, count)
    own = folder / peer.key
    own.mkdir()
    return Setting(copy.deepcopy(work.model), forget, retain, own)


def portion(work: Workload, count: int) -> tuple[SampleSet, SampleSet]:
    """About `count` samples of both sets, in their proportion, one of each at least."""
    part = min(1.0, count / (len(work.forget) + len(work.retain)))
    forget, retain = (spread(samples, max(1, round(part * len(samples)))) for samples in (work.forget, work.retain))
    return forget, retain


def prepared(
    peers: Sequence[Peer], work: Workload, some: int, few: int, folder: Path, say: Callable[[str], None]
) -> list[Entry]:
    """Every peer made, warm, and with the batches that were its fastest."""
    entries = []
    for peer in peers:
        entry = Entry(peer, settings_of(peer, work, some, few, folder))
        entries.append(entry)
        attempt(entry, lambda entry=entry: _prepare(entry))
        say(f"{peer.key}: {entry.why or 'ready'}" + (f", {entry.tokens} tokens a batch" if entry.tokens else ""))
    return entries


def _prepare(entry: Entry) -> None:
    peer, setting = entry.peer, entry.setting
    if len(peer.budgets) == 1:
        entry.tokens = peer.budgets[0]
    if len(peer.budgets) > 1:  # on a model of its own: hooks are set when a peer is made
        folder = setting.folder / "tuning"
        folder.mkdir()
        # Over all of its samples: a small part pads wide batches more, and would favour narrow ones.
        trial = dataclasses.replace(setting, model=copy.deepcopy(setting.model), folder=folder)
        ready = peer.make(trial)
        taken = {
            tokens: min(_seconds(ready, tokens, setting.device) for _ in range(TUNING_RUNS)) for tokens in peer.budgets
        }
        entry.tokens = min(taken, key=taken.__getitem__)
    entry.ready = peer.make(setting)
    entry.ready.run(entry.tokens)


def measure(entries: Sequence[Entry], rounds: int, say: Callable[[str], None]) -> None:
    """A B C, A B C, ...: a busy moment of the machine hits all alike. One that fails takes no further part."""
    for number in range(rounds):
        for entry in entries:
            if entry.ready is not None:
                attempt(entry, lambda entry=entry: _timed(entry))
        times = ", ".join(f"{e.peer.key} {1e3 * e.seconds[-1]:.1f} ms" for e in entries if e.ready is not None)
        say(f"round {number + 1} of {rounds}: {times}")


def _timed(entry: Entry) -> None:
    gc.collect()
    entry.seconds.append(_seconds(entry.ready, entry.tokens, entry.setting.device) / entry.num_samples)


def _seconds(ready: Ready, tokens: int, device: torch.device) -> float:
    begun = time.perf_counter()
    ready.run(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def attempt(entry: Entry, work: Callable[[], None]) -> None:
    """Runs part of a peer, quietly; what it raises becomes the reason of its row.

    Raises:
        RuntimeError: where plain forward + backward or a ranking of ours is what fails.
    """
    try:
        with _quiet():
            work()
    except Absent as error:
        entry.ready, entry.why = None, str(error)
    except FillmError as error:
        raise UsageError(f"{entry.peer.key}: {error}") from error
    except Exception as error:  # a peer may raise anything
        if entry.peer.key == PLAIN or not entry.peer.package:
            raise
        entry.ready, entry.why = None, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, notes or warnings of theirs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def rows_of(entries: Sequence[Entry], memory: dict[str, int | None]) -> list[Row]:
    """A row a peer; ratios are medians of the ratios within each round."""
    plain = next(entry for entry in entries if entry.peer.key == PLAIN)
    rows = []
    for entry in entries:
        peer, ready = entry.peer, entry.ready
        row: Row = {"key": peer.key, "what": peer.what, "computes": peer.computes, "package": peer.package}
        row["version"] = peer.version()
        if ready is None:
            rows.append(row | {"note": entry.why})
            continue
        ratios = [own / base for own, base in zip(entry.seconds, plain.seconds, strict=True)]
        row |= {
            "samples": entry.num_samples,
            "tokens_per_batch": entry.tokens or "",
            "rounds": len(entry.seconds),
            **spread_of("seconds_per_sample", entry.seconds),
            **spread_of("over_plain", ratios),
            "covered": ready.covered / entry.setting.parameters,
            "note": ready.note,
        }
        if memory.get(peer.key) is not None:
            row["extra_bytes"] = memory[peer.key]
        rows.append(row)
    return rows
