"""What `--dry-run` prints: the passes of a run, its memory and FLOP line by line, its time."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PassPlan:
    """One pass over one set.

    Attributes:
        name: what its progress bar says.
        samples, tokens, batches: what it visits; tokens without padding.
        flop: by what they are spent on.
    """

    name: str
    samples: int
    tokens: int
    batches: int
    flop: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        tensors, parameters: in scope.
        passes: in the order of the run; a pass over what the bracket does not certify comes on top, if it is needed.
        memory: bytes by purpose; their sum is the expected peak.
        rate: FLOP/s that `seconds` assumes.
        notes: what the figures rest on.
    """

    tensors: int
    parameters: int
    passes: tuple[PassPlan, ...]
    memory: Mapping[str, int]
    rate: float
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory."""
        return sum(self.memory.values())

    @property
    def flop(self) -> dict[str, float]:
        """FLOP of all passes, by what they are spent on."""
        total: dict[str, float] = {}
        for one in self.passes:
            for name, value in one.flop.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @property
    def seconds(self) -> float:
        """Time at `rate`."""
        return sum(self.flop.values()) / self.rate

    def lines(self) -> list[str]:
        """The plan for people, figures aligned."""
        rows: list[tuple[str, str]] = [("tensors in scope", f"{self.tensors} ({self.parameters:,} parameters)")]
        for one in self.passes:
            rows.append((one.name, f"{one.samples} samples, {one.tokens:,} tokens, {one.batches} batches"))
        rows += [("memory", ""), *((f"  {name}", in_bytes(size)) for name, size in self.memory.items())]
        rows += [("  expected peak", in_bytes(self.peak_bytes)), ("FLOP", "")]
        rows += [(f"  {name}", f"{value:.3e}") for name, value in self.flop.items()]
        rows += [("  total", f"{sum(self.flop.values()):.3e}")]
        rows += [("time", f"{_duration(self.seconds)} at {self.rate / 1e9:,.1f} GFLOP/s")]
        width = max(len(name) for name, _ in rows)
        return [f"{name.ljust(width)}  {value}".rstrip() for name, value in rows] + [
            f"note: {note}" for note in self.notes
        ]


def in_bytes(size: int) -> str:
    """A number of bytes for people: `1.5 GiB`."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def _duration(seconds: float) -> str:
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200.0 else f"{seconds / 3600:.1f} h"
