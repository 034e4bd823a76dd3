"""The settings of `python -m benchmarks.compression`."""

from dataclasses import dataclass, fields

from fillm.capture.sketching import KINDS
from fillm.config import flag_name, option
from fillm.errors import UsageError

PROGRAM = "python -m benchmarks.compression"
# Of the sizes 2^6 to 2^18, those that are taken first where time is short.
SIZES = (4096, 256, 65536, 1024, 16384, 64, 262144, 512, 2048, 8192, 32768, 131072, 128)
LARGEST_DENSE = 512  # dense kinds make every entry of their map anew
RETAIN_COUNTS = (25, 60, 120, 240)
FREE = ("out", "resume", "debug", "minutes", "workloads")  # change what is measured, but not what a measurement is


@dataclass(frozen=True)
class CompressionConfig:
    """Measures every compression of gradients against exact inner products: accuracy, error bars, bytes and time."""

    model: str | None = option(None, "folder of a causal LM, with --forget and --retain; without it, the study", "DIR")
    tokenizer: str | None = option(None, "folder, if not the model's", "DIR")
    forget: str | None = option(None, "data spec of the rows to forget", "SPEC")
    retain: str | None = option(None, "data spec of the rows to keep", "SPEC")
    data_root: str | None = option(None, "folder that holds tofu/ (or set FILLM_DATA); else fictional authors", "DIR")
    workloads: str | None = option(None, "comma-separated names of the workloads to measure (default: all)", "NAMES")
    kinds: str | None = option(None, "comma-separated kinds of sketches (default: all)", "KINDS")
    sizes: str | None = option(None, "comma-separated sizes, all of them, whatever the time", "SIZES")
    minutes: float = option(15.0, "for all workloads; sizes for which there is no time are left out, and named", "X")
    rounds: int = option(3, "rounds of timing on the first workload beside plain forward + backward; 0 for none", "N")
    timed_samples: int = option(48, "samples of both sets together that a round of timing runs on", "N")
    damping: float = option(0.1, "factor in equation (1)", "X")
    seed: int = option(0, "of the sketches, and of the order that subsets of the retain set are taken in", "N")
    threads: int | None = option(None, "torch threads (default: torch's own choice)", "N")
    quick: bool = option(False, "tiny models, two kinds, two sizes: whether it runs at all")
    resume: bool = option(False, "keep what a run with the same settings has measured, and measure what it has not")
    out: str = option("benchmarks/results", "folder for compression.parquet, .csv and the pictures", "DIR")
    debug: bool = option(False, "show a traceback with every error")

    @property
    def chosen_kinds(self) -> tuple[str, ...]:
        """The kinds of sketches, in the library's order."""
        if self.kinds is not None:
            named = _words(self.kinds)
            return tuple(kind for kind in KINDS if kind in named)
        return ("sjlt", "factored") if self.quick else KINDS

    @property
    def chosen_sizes(self) -> tuple[int, ...] | None:
        """The sizes that were asked for, None for as many as there is time for."""
        if self.sizes is not None:
            return tuple(int(word) for word in _words(self.sizes))
        return (64, 256) if self.quick else None

    @property
    def measurement(self) -> dict[str, object]:
        """What has to be the same for two measurements of a workload to be the same."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in FREE}


def check(config: CompressionConfig) -> None:
    """Refuses what cannot be measured.

    Raises:
        UsageError: naming the option.
    """
    given = [name for name in ("model", "forget", "retain") if getattr(config, name) is not None]
    if given and len(given) < 3:
        raise UsageError("--model, --forget and --retain go together")
    for name in ("rounds", "timed_samples", "threads"):
        value, least = getattr(config, name), 0 if name == "rounds" else 2 if name == "timed_samples" else 1
        if value is not None and value < least:
            raise UsageError(f"{flag_name(name)} {value}: give at least {least}")
    for name in ("minutes", "damping"):
        if not getattr(config, name) > 0:
            raise UsageError(f"{flag_name(name)} {getattr(config, name)}: has to be above 0")
    unknown = [kind for kind in _words(config.kinds or "") if kind not in KINDS]
    if unknown:
        raise UsageError(f"--kinds: there is no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    for word in _words(config.sizes or ""):
        if not word.isdecimal() or int(word) < 2 or int(word) & (int(word) - 1):
            raise UsageError(f"--sizes {word}: give powers of two")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
