"""What keeping costs at equal forgetting: the part that the studies of masks share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.experiment.case import Case
from benchmarks.experiment.results import Record
from benchmarks.unlearning.results import best
from benchmarks.unlearning.settings import UnlearningConfig
from benchmarks.unlearning.study import AT_LEVELS, FORGET_LEVELS, next_rate, unlearned
from fillm.masks import Mask
from fillm.report.figures.damage import against_whole, merged
from fillm.report.figures.intervals import Interval
from fillm.unlearn.masked_optimizer import mask_digest

COLUMNS = (
    "choice", "loss", "mask", "selected_parameters", "selected_tensors", "forget_start", "retain_start",
    *FORGET_LEVELS, *AT_LEVELS, "rates",
)  # fmt: skip
KEY = ("choice", "loss")
LOSSES = ("ga", "grad-diff")
ALONE = " without retain term"  # after a loss that has one
BY_SOPHIA = " by sophia"  # after a loss, where the optimiser is not AdamW
# What a mask is called (`choice`, and whatever else the study says of it), and what makes it.
Choice = tuple[Record, Callable[[], Mask]]
DEFAULTS: Mapping[str, Any] = {
    "losses": list(LOSSES), "batch_size": 20, "max_steps": 60, "eval_every": 2, "eval_retain": 80
}  # fmt: skip


def settings_of(given: Mapping[str, Any], quick: bool) -> UnlearningConfig:
    """What an unlearning takes, of a study's settings."""
    chosen = {name: given[name] for name in ("batch_size", "max_steps", "eval_every", "eval_retain")}
    return UnlearningConfig(quick=quick, **{**chosen, **({"max_steps": 4} if quick else {})})


def records(
    case: Case, choices: Iterable[Choice], settings: Mapping[str, Any], done: Sequence[Record]
) -> Iterator[Record]:
    """A record a mask and loss: the retain loss at the levels of the forget loss, at the best of the rates tried.

    Args:
        case: the model.
        choices: masks; equal ones are trained once, and none is made whose records are there.
        settings: of the study; `DEFAULTS` says which.
        done: records that are there already.
    """
    config = settings_of(settings, case.quick)
    there = {(row["choice"], row["loss"]): row for row in done}
    trained: dict[tuple[str, str], Record] = {(row["mask"], row["loss"]): row for row in done}
    losses = settings["losses"][:1] if case.quick else settings["losses"]
    for about, made in choices:
        missing = [loss for loss in losses if (about["choice"], loss) not in there]
        mask = made() if missing else None
        digest = mask_digest(mask)[:16] if mask else ""
        for loss in missing:
            found = trained.get((digest, loss)) or _best_of_rates(config, case, mask, loss)
            kept = {name: found[name] for name in COLUMNS if name not in ("choice", "loss", "mask")}
            trained[digest, loss] = kept
            yield {"family": case.family, "seed": case.seed, **about, "loss": loss, "mask": digest, **kept}


def _best_of_rates(config: UnlearningConfig, case: Case, mask: Mask, loss: str) -> Record:
    tried: dict[float, Record] = {}
    name, options = loss, dict[str, Any]()
    for suffix, option in ((BY_SOPHIA, {"optimizer": "sophia"}), (ALONE, {"alpha": 0.0})):
        if name.endswith(suffix):
            name, options = name.removesuffix(suffix), options | option
    while (rate := next_rate(tried)) is not None:
        tried[rate] = unlearned(config, case, "", mask, name, rate, **options)
    runs = list(tried.values())
    at_levels = {column: best(runs, column) for column in AT_LEVELS}
    return {**runs[0], **at_levels, "rates": " ".join(f"{rate:g}" for rate in sorted(tried))}


def at_both_levels(rows: Sequence[Record], choice: str, loss: str) -> list[tuple[str, Interval]]:
    """A choice's damage over that of the whole model at the two forget losses, as a figure names them."""
    levels = [rows[0][column] for column in FORGET_LEVELS]
    return [
        (f"at forget loss {level:g}", against_whole(rows, choice, loss, column)[0])
        for column, level in zip(AT_LEVELS, levels, strict=True)
    ]


def table(rows: Sequence[Record], title: str) -> str:
    """A Markdown table: damage over that of the whole model, by choice and loss, at both levels."""
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    choices = list(dict.fromkeys(merged(row["choice"]) for row in rows))
    low, high = (rows[0][column] for column in FORGET_LEVELS)
    columns = [(loss, column, level) for loss in losses for column, level in zip(AT_LEVELS, (low, high), strict=True)]
    lines = [f"{title}: retain damage over that of the whole model, geometric mean (95 % interval)", ""]
    lines += ["| mask | " + " | ".join(f"{loss} at {level:g}" for loss, _, level in columns) + " |"]
    lines += ["|---|" + "---|" * len(columns)]
    for choice in choices:
        cells = []
        for loss, column, _ in columns:
            found, never = against_whole(rows, choice, loss, column)
            cells.append(f"{found}{f', {never} never' if never else ''}")
        lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
