"""What `--dry-run` prints: the passes of a run, its memory, its work and time on one device line by line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        flops: FLOP of matrix products.
        bandwidth: bytes to and from its memory.
        link: bytes that it receives from the others; None if that is not known, and left out of the time.
        measured: which of these were measured here; the others were given.
    """

    flops: float
    bandwidth: float = float("inf")
    link: float | None = None
    measured: Sequence[str] = ()


@dataclass(frozen=True)
class PassPlan:
    """One pass over one set.

    Attributes:
        name: what its progress bar says.
        samples, tokens, batches: what it visits, on all devices together; tokens without padding.
        flop: of one device, by what they are spent on.
        moved: bytes to and from a device's memory, by the same names.
        received: bytes that a device receives from the others.
    """

    name: str
    samples: int
    tokens: int
    batches: int
    flop: Mapping[str, float]
    moved: Mapping[str, float] = field(default_factory=dict)
    received: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        tensors, parameters: in scope.
        passes: in the order of the run; a pass over what the bracket does not certify comes on top, if it is needed.
        memory: bytes of a device by purpose; their sum is the expected peak.
        rates: that `seconds` assumes.
        notes: what the figures rest on.
        devices: how many there are.
    """

    tensors: int
    parameters: int
    passes: tuple[PassPlan, ...]
    memory: Mapping[str, int]
    rates: Rates
    notes: tuple[str, ...] = ()
    devices: int = 1

    @property
    def peak_bytes(self) -> int:
        """Expected peak memory of a device."""
        return sum(self.memory.values())

    @property
    def flop(self) -> dict[str, float]:
        """FLOP of a device in all passes, by what they are spent on."""
        return _added_up([one.flop for one in self.passes])

    @property
    def moved(self) -> dict[str, float]:
        """Bytes to and from a device's memory in all passes, by the same names."""
        return _added_up([one.moved for one in self.passes])

    @property
    def received(self) -> float:
        """Bytes that a device receives from the others in all passes."""
        return sum(one.received for one in self.passes)

    @property
    def times(self) -> dict[str, float]:
        """Seconds of every part, by the same names: what takes longer, its FLOP or its bytes (roofline)."""
        moved = self.moved
        return {
            name: max(value / self.rates.flops, moved.get(name, 0.0) / self.rates.bandwidth)
            for name, value in self.flop.items()
        }

    @property
    def link_seconds(self) -> float:
        """Seconds of what comes from the other devices; 0 where no rate is known."""
        return self.received / self.rates.link if self.rates.link else 0.0

    @property
    def seconds(self) -> float:
        """Time at `rates`, one part after the other."""
        return sum(self.times.values()) + self.link_seconds

    def lines(self) -> list[str]:
        """The plan for people, figures aligned."""
        rows: list[tuple[str, str]] = [("tensors in scope", f"{self.tensors} ({self.parameters:,} parameters)")]
        rows += [("devices", str(self.devices))] if self.devices > 1 else []
        for one in self.passes:
            rows.append((one.name, f"{one.samples} samples, {one.tokens:,} tokens, {one.batches} batches"))
        of = " of a device" if self.devices > 1 else ""
        rows += [(f"memory{of}", ""), *((f"  {name}", in_bytes(size)) for name, size in self.memory.items())]
        rows += [("  expected peak", in_bytes(self.peak_bytes)), (f"work{of}", "")]
        moved, times = self.moved, self.times
        for name, value in self.flop.items():
            rows.append((f"  {name}", _work(value, moved.get(name, 0.0), times[name])))
        rows += [("  total", _work(sum(self.flop.values()), sum(moved.values()), sum(times.values())))]
        if self.devices > 1:
            said = _duration(self.link_seconds) if self.rates.link else "no rate: give --plan-link"
            rows += [("  from other devices", f"{in_bytes(int(self.received))}, {said}")]
        rows += [("time", f"{_duration(self.seconds)} {self._at_rates()}")]
        width = max(len(name) for name, _ in rows)
        return [f"{name.ljust(width)}  {value}".rstrip() for name, value in rows] + [
            f"note: {note}" for note in self.notes
        ]

    def _at_rates(self) -> str:
        size, unit = (1e12, "TFLOP/s") if self.rates.flops >= 1e12 else (1e9, "GFLOP/s")
        rates = {"flops": f"{self.rates.flops / size:,.1f} {unit}"}
        rates["bandwidth"] = f"{self.rates.bandwidth / 1e9:,.1f} GB/s of memory"
        if self.devices > 1 and self.rates.link:
            rates["link"] = f"{self.rates.link / 1e9:,.1f} GB/s from other devices"
        told = [f"{said} ({'measured' if n in self.rates.measured else 'given'})" for n, said in rates.items()]
        return f"at {', '.join(told)}"


def _added_up(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _work(flop: float, moved: float, seconds: float) -> str:
    return f"{flop:.3e} FLOP, {in_bytes(int(moved))} moved, {_duration(seconds)}"


def in_bytes(size: int) -> str:
    """A number of bytes for people: `1.50 GiB`."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:,.{2 if factor >= 1 << 30 else 1}f} {unit}"
    return f"{size} B"


def _duration(seconds: float) -> str:
    if 0.0 < seconds < 0.1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200.0 else f"{seconds / 3600:.1f} h"
