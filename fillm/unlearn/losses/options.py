"""The losses by name, and their options with published defaults; reading them loads no torch."""

import math
import re
from dataclasses import dataclass
from typing import Any

from fillm.config import flag_name
from fillm.errors import UsageError

# What a loss takes, with its default. Where paper and released code differ, the table in docs/losses.md says so.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ga": {"gamma": 1.0},
    "grad-diff": {"gamma": 1.0, "alpha": 1.0, "retain_loss": "nll"},
    "kl": {"gamma": 1.0, "alpha": 1.0},
    "idk": {"gamma": 1.0, "alpha": 1.0, "retain_loss": "nll", "idk": None},
    "dpo": {"gamma": 1.0, "alpha": 1.0, "retain_loss": "nll", "beta": 0.1, "idk": None},
    "npo": {"gamma": 1.0, "alpha": 1.0, "retain_loss": "nll", "beta": 0.1},
    "simnpo": {"gamma": 0.125, "alpha": 1.0, "retain_loss": "nll", "beta": 4.5, "delta": 0.0},
    "rmu": {"gamma": 1.0, "alpha": 100.0, "rmu_layer": 7, "rmu_coefficient": 20.0},
    "undial": {"gamma": 1.0, "alpha": 0.0, "retain_loss": "nll", "beta": 10.0},
    "wga": {"gamma": 1.0, "alpha": 1.0, "retain_loss": "nll", "beta": 1.0},
    "satimp": {"gamma": 0.1, "alpha": 1.0, "retain_loss": "nll", "beta1": 5.0, "beta2": 1.0},
}
GRADIENT_LOSSES = tuple(DEFAULTS)

# Names of papers and of other code, in lower case without - and _.
_PUBLISHED = {
    "gradascent": "ga",
    "gradientascent": "ga",
    "graddiff": "grad-diff",
    "gradientdifference": "grad-diff",
    "ascentplusdescent": "grad-diff",
    "ascentpluskldivergence": "kl",
    "gradascentkl": "kl",
    "idkdpo": "dpo",
}


@dataclass(frozen=True)
class LossOptions:
    """What a user may set; None stands for the loss's own default.

    Attributes:
        gamma: weight of the forget term.
        alpha: weight of the retain term; 0 leaves it out.
        retain_loss: `nll`, or `kl` from the original model.
        beta: of `npo`, `dpo`, `simnpo` the inverse temperature; of `undial` what is taken off the logit; of `wga` the
            exponent.
        beta1, beta2: exponents of `satimp`.
        delta: margin of `simnpo`, in nats per token.
        idk: file of answers for `idk` and `dpo`, one a line.
        rmu_layer: block whose output `rmu` steers, from 0.
        rmu_coefficient: length of its control vector.
        seed: of the control vector; every loss takes it.
    """

    gamma: float | None = None
    alpha: float | None = None
    retain_loss: str | None = None
    beta: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    delta: float | None = None
    idk: str | None = None
    rmu_layer: int | None = None
    rmu_coefficient: float | None = None
    seed: int = 0


def canonical_loss(name: str, beside: tuple[str, ...] = ()) -> str:
    """The name used here, whatever published name was given (`GradDiff`, `grad_ascent`, `IdkDPO`, ...).

    Args:
        name: any spelling.
        beside: what else may be meant, as it is called here.

    Raises:
        UsageError: if neither a gradient loss nor anything of `beside` is called so.
    """
    bare, known = re.sub("[-_+ ]", "", name.lower()), (*GRADIENT_LOSSES, *beside)
    found = _PUBLISHED.get(bare) or next((loss for loss in known if loss.replace("-", "") == bare), None)
    if found is None:
        raise UsageError(f"--loss {name}: is none of {', '.join(known)}")
    return found


def resolved_options(name: str, options: LossOptions) -> dict[str, Any]:
    """The options of a loss with its defaults filled in.

    Args:
        name: any of its names.
        options: as the user set them.

    Returns:
        One entry an option that the loss has; `seed` is not among them.

    Raises:
        UsageError: if the loss is unknown, has no use for an option that was set, or a value is out of range.
    """
    name = canonical_loss(name)
    given = {key: value for key, value in vars(options).items() if value is not None and key != "seed"}
    for key, value in given.items():
        if key not in DEFAULTS[name]:
            users = ", ".join(loss for loss, takes in DEFAULTS.items() if key in takes)
            raise UsageError(
                f"{flag_name(key)} {value} has no effect: it is an option of --loss {users}, not of {name}; "
                "leave it out"
            )
        if (wrong := _wrong(name, key, value)) is not None:
            raise UsageError(f"{flag_name(key)} {value}: {wrong}")
    settings = {**DEFAULTS[name], **given}
    if "retain_loss" in given and not settings["alpha"]:
        raise UsageError(f"--retain-loss {options.retain_loss} has no effect with --alpha 0: give an --alpha above 0")
    return settings


def _wrong(name: str, key: str, value: Any) -> str | None:
    """What a value has to be, if it is not."""
    if key == "retain_loss":
        return None if value in ("nll", "kl") else "give nll or kl"
    if key == "idk":
        return None
    if not math.isfinite(value):
        return "give a finite number"
    if key == "delta":
        return None
    divides = (key == "beta" and name in ("npo", "dpo", "simnpo")) or key == "rmu_coefficient"
    if divides and value <= 0:
        return "give a number above 0"
    return "give 0 or more" if value < 0 else None
