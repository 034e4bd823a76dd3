r"""Public packages that go through per-sample gradients beside fillm's rankings: one model, the same samples, one run.

    python -m benchmarks.end_to_end.bench_peers --data-root DIR --rounds 5

In an environment of its own, where fillm and its dependencies are at hand:

    pip install --no-deps bergson opacus traker dattri simple-parsing docstring-parser jaxtyping wadler-lindig \
        ml_dtypes natsort petname torchopt optree opt-einsum

(opacus and dattri bring top-level packages called `examples`, `docs`, `test` and `benchmarks`, which hide others'.)
A package that is not there, or fails, is a row that says why. Passes alone are timed: imports, reading the model,
wrapping it and a run of warm-up come before. Every peer takes the budget of tokens a batch that was its fastest of a
trial, fillm its default. `--page FILE` writes the table of a finished run into a page and measures nothing.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.end_to_end.peers.page import read, rewrite, table
from benchmarks.end_to_end.peers.registry import PEERS, PLAIN, Peer
from benchmarks.end_to_end.peers.rounds import (
    MEASURED,
    Entry,
    attempt,
    measure,
    prepared,
    rows_of,
    settings_of,
)
from benchmarks.end_to_end.results import Row, provenance, write_csv
from benchmarks.end_to_end.settings import BenchConfig
from benchmarks.end_to_end.workload import Workload, load_workload, resolve
from benchmarks.kernels.memory import extra_bytes
from fillm.config import flag_name, option, run_command
from fillm.errors import UsageError

PROGRAM = "python -m benchmarks.end_to_end.bench_peers"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PeersConfig:
    """Times public packages that go through per-sample gradients beside fillm's rankings."""

    model: str | None = option(None, "folder of a causal LM; without it, the one of bench_rank, made once", "DIR")
    tokenizer: str | None = option(None, "folder, if not the model's", "DIR")
    forget: str | None = option(None, "data spec of the rows to forget (default: as bench_rank)", "SPEC")
    retain: str | None = option(None, "data spec of the rows to keep (default: as bench_rank)", "SPEC")
    data_root: str | None = option(None, "folder that holds tofu/ (or set FILLM_DATA)", "DIR")
    samples_per_set: int | None = option(None, "use this many samples of each set at most, for a trial run", "N")
    some: int = option(60, "samples of what keeps whole gradients", "N")
    few: int = option(8, "samples of dense projections, which take seconds each", "N")
    rounds: int = option(5, "rounds; every round runs everything once, after a warm-up", "N")
    only: str | None = option(None, f"comma-separated keys: {', '.join(peer.key for peer in PEERS)}", "KEYS")
    threads: int | None = option(None, "torch threads (default: torch's own choice)", "N")
    device: str = option("cpu", "cpu or cuda", "NAME")
    dtype: str = option("float32", f"of the model: {' or '.join(DTYPES)}", "NAME")
    memory: bool = option(True, "measure peak memory, each thing in a process of its own")
    out: str = option("benchmarks/results/peers_cpu.csv", "CSV file to write", "FILE")
    page: str | None = option(None, "write the table of --out into this page, and measure nothing", "FILE")
    debug: bool = option(False, "show a traceback with every error")


def check(config: PeersConfig) -> list[Peer]:
    """The peers that are asked for; plain is always among them.

    Raises:
        UsageError: a number below 1, or a key, device or dtype that does not exist.
    """
    for name in ("rounds", "some", "few", "samples_per_set", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_name(name)} {value}: give at least 1")
    if config.dtype not in DTYPES:
        raise UsageError(f"--dtype {config.dtype}: choose {' or '.join(DTYPES)}")
    if config.device not in ("cpu", "cuda"):
        raise UsageError(f"--device {config.device}: choose cpu or cuda")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device")
    known = [peer.key for peer in PEERS]
    wanted = known if config.only is None else [name.strip() for name in config.only.split(",")]
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"--only {', '.join(unknown)}: there are {', '.join(known)}")
    return [peer for peer in PEERS if peer.key in wanted or peer.key == PLAIN]


def load(config: PeersConfig) -> Workload:
    """Model and samples, on the device and in the dtype.

    Raises:
        FillmError: as the data and model rooms do.
    """
    work = load_workload(_as_rank(config))
    return replace(work, model=work.model.to(config.device, getattr(torch, config.dtype)))


def _as_rank(config: PeersConfig) -> BenchConfig:
    shared = ("model", "tokenizer", "forget", "retain", "data_root", "samples_per_set", "threads")
    return BenchConfig(**{name: getattr(config, name) for name in shared})


def bench(config: PeersConfig) -> list[Row]:
    """The command: measures, prints, writes the CSV.

    Returns:
        The rows of the CSV, without the provenance.

    Raises:
        UsageError: a setting out of range, or a file that cannot be written.
        FillmError: as loading model and data does.
    """
    peers = check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    found = resolve(_as_rank(config), _say)
    asked, config = config, replace(config, model=found.model, forget=found.forget, retain=found.retain)
    work = load(config)
    with tempfile.TemporaryDirectory() as folder:
        entries = prepared(peers, work, config.some, config.few, Path(folder), _say)
        measure(entries, config.rounds, _say)
    memory = {entry.peer.key: _memory(config, entry, _say) for entry in entries if config.memory and entry.ready}
    rows = rows_of(entries, memory)
    made = provenance(replace(asked, forget=config.forget, retain=config.retain), work, PROGRAM)
    write_csv(Path(config.out), rows, made, MEASURED)
    print(table(read(Path(config.out))))
    return rows


def _memory(config: PeersConfig, entry: Entry, say: Callable[[str], None]) -> int | None:
    """Of one run in a fresh process; None where the system does not say or the process dies."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            found = process.submit(peak, config, entry.peer.key, entry.tokens).result()
        except BrokenProcessPool:
            found = None
    say(f"peak memory of {entry.peer.key}: {'unknown' if found is None else f'{found / 2**20:.0f} MiB'}")
    return found


def peak(config: PeersConfig, key: str, tokens: int) -> int | None:
    """Most bytes during the first run of a peer beyond those with the model loaded: resident, or allocated on a GPU."""
    if config.threads:
        torch.set_num_threads(config.threads)
    work = load(config)
    peer = next(peer for peer in PEERS if peer.key == key)
    with tempfile.TemporaryDirectory() as folder:
        entry = Entry(peer, settings_of(peer, work, config.some, config.few, Path(folder)))
        found: list[int | None] = [None]

        def measured() -> None:
            ready = peer.make(entry.setting)
            if config.device == "cpu":
                found[0] = extra_bytes(lambda: ready.run(tokens))
                return
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ready.run(tokens)
            found[0] = torch.cuda.max_memory_allocated() - before

        attempt(entry, measured)
    return found[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `PeersConfig`.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input.
    """

    def run(config: PeersConfig) -> None:
        if config.page is None:
            bench(config)
        else:
            rewrite(Path(config.page), table(read(Path(config.out))))

    return run_command(PeersConfig, run, argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
