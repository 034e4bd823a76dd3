"""What `--compression`, `--store` and `--memory` may be asked for, and sizes of memory as people write them."""

import re
from typing import TYPE_CHECKING

from fillm.errors import UsageError

if TYPE_CHECKING:
    from fillm.rank.config import RankConfig

SKETCHED_METHODS = ("soir", "soir-per-sample", "first-order", "memflex")
LARGEST_SKETCH = 1 << 24
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_size(text: str, option: str = "--memory") -> int:
    """Bytes of `8GiB`, `500 MB`, `1.5gib` or a plain number.

    Raises:
        UsageError: if it is none of these, or not above 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?b)?\s*", text.lower())
    unit = (match.group(2) or "") if match else "?"
    unit = "" if unit == "b" else unit
    if match is None or unit not in _UNITS or not float(match.group(1)) > 0:
        raise UsageError(f"{option} {text}: give a size such as 8GiB, 500MB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[unit])


def check_sketching(config: "RankConfig") -> None:
    """Refuses what sketches cannot answer, and options that have nothing to do without them.

    Raises:
        UsageError: naming the option.
    """
    if config.memory is not None:
        parse_size(config.memory)
        if config.compression != "auto" and not config.exact_gram:
            raise UsageError(
                "--memory has no effect here: it bounds --compression auto, and the exact --curvature woodbury, "
                "--method soir-per-sample and first-order; leave it out"
            )
    if config.tolerance != 1e-3 and (config.sketched or config.curvature == "woodbury"):
        raise UsageError("--tolerance has no effect: nothing is certified by a bracket here; leave it out")
    if not config.sketched:
        for option, unused in (
            ("--sketch-dim", config.sketch_dim == 4096),
            ("--sketch-dtype", config.sketch_dtype == "float32"),
            ("--damping-dimension", config.damping_dimension == "parameter"),
        ):
            if not unused:
                raise UsageError(f"{option} has no effect without --compression; leave it out, or choose a kind")
        return
    method = config.canonical_method
    given = "--compression" if config.compression != "none" else "--store"
    if method not in SKETCHED_METHODS:
        raise UsageError(
            f"--method {method} cannot be answered from sketches ({', '.join(SKETCHED_METHODS)} can); leave out {given}"
        )
    for refused, what in (
        (config.granularity != "tensor", f"--granularity {config.granularity}: sketches know whole tensors"),
        (config.curvature == "diagonal", "--curvature diagonal: sketches do not know single weights"),
        (config.score == "mean-abs", "--score mean-abs: sketches know the length of u, not its entries"),
        (config.save_update, "--save-update: sketches do not hold u"),
    ):
        if refused:
            raise UsageError(f"{what}; leave out {given}")
    if not 1 <= config.sketch_dim <= LARGEST_SKETCH:
        raise UsageError(f"--sketch-dim must be between 1 and {LARGEST_SKETCH}, not {config.sketch_dim}")
    if config.compression not in ("none", "auto"):
        from fillm.capture import check_sketch  # with it comes torch, which --help can do without

        check_sketch(config.compression, config.sketch_dim)
    if config.damping_dimension == "sketch" and (
        method != "soir" or config.curvature != "datainf" or config.objective != "forget"
    ):
        raise UsageError(
            "--damping-dimension sketch restates published code: --method soir --curvature datainf --objective forget"
        )
