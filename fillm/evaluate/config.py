"""The settings of `python -m fillm.evaluate`: the one source of its flags, its YAML file and its Python arguments."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from fillm.config import flag_name, option
from fillm.data.templates import DEFAULT_TEMPLATE
from fillm.errors import UsageError

MIN_K_FRACTION = 0.4  # of OpenUnlearning's settings of TOFU and MUSE; the paper takes 0.2, for long passages
DEFAULT_BATCH_SIZE = 64  # prompts that are answered at a time where nothing else is said


@dataclass(frozen=True)
class EvaluateConfig:
    """Say with the field's metrics what a language model still knows of a forget set, and what it kept."""

    model: str | None = option(None, "folder of the model, or its Hub id", "PATH")
    adapter: str | None = option(None, "path or Hub id of a PEFT adapter", "PATH")
    tokenizer: str | None = option(None, "path or Hub id, if not the model's", "PATH")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "dtype of the weights")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = option(False, "allow a model folder's own Python code to run")
    benchmark: Literal["tofu", "fictional", "fictional-small", "knowundo"] = option("tofu", "whose rows and metrics")
    forget: str | None = option(None, "the forget split, such as forget01", "SPLIT")
    reference: str | None = option(
        None, "run folder of this command, of the model that never saw the forget set; what is compared needs it", "RUN"
    )
    holdout: str | None = option(None, "data spec of rows that no model was trained on (default: by --forget)", "SPEC")
    metrics: str | None = option(None, "comma-separated names (default: all of the benchmark)", "NAMES")
    truth_ratio: Literal["geometric", "arithmetic"] = option(
        "geometric", "mean over the perturbed answers: as the published code takes it, or as the paper does"
    )
    min_k: float = option(MIN_K_FRACTION, "fraction of an answer's tokens that Min-K% and Min-K%++ look at", "FRACTION")
    gradient_include: str | None = option(
        None, "comma-separated kinds or globs of the tensors that mia-gradient-norm takes (default: all)", "GLOBS"
    )
    lm_eval: str | None = option(None, "comma-separated tasks for lm-evaluation-harness, if it is installed", "TASKS")
    data_root: str | None = option(None, "folder that holds tofu/ and knowundo/ (or set FILLM_DATA)", "DIR")
    template: str = option(DEFAULT_TEMPLATE, "prompt template, or chat for the tokenizer's own", "TEXT")
    max_length: int = option(512, "longest sample in tokens", "N")
    max_new_tokens: int = option(200, "longest generated answer in tokens", "N")
    num_forget: int | None = option(None, "use this many forget rows (default: at most 300, as published)", "N")
    num_retain: int | None = option(None, "use this many retain rows (default: at most 300, as published)", "N")
    seed: int | None = option(None, "draw those rows with this seed (default: the first ones, as published)", "N")
    tokens_per_batch: int | None = option(None, "most tokens of a scored batch, padding included", "N")
    batch_size: int | None = option(None, f"most samples of a batch (default: {DEFAULT_BATCH_SIZE} generated)", "N")
    from_log: str | None = option(None, "score a published TOFU log (eval_log_aggregated.json), no model", "LOG")
    reference_log: str | None = option(None, "with --from-log: the retain model's log", "LOG")
    out: str = option("runs/evaluate", "run folder to write", "DIR")
    resume: bool = option(False, "continue an interrupted run in --out")
    overwrite: bool = option(False, "replace an existing --out")
    dry_run: bool = option(False, "print the rows and tokens of every pass; load no model")
    debug: bool = option(False, "show a traceback with every error")


# Settings that say where and how a run goes on, not what it computes.
FREE_ON_RESUME = ("out", "resume", "overwrite", "dry_run", "debug", "data_root", "device", "reference", "holdout")
# Settings of the command that a function with a model in hand has no use for.
COMMAND_ONLY = (
    "model", "adapter", "tokenizer", "dtype", "device", "trust_remote_code", "from_log", "reference_log", "dry_run",
)  # fmt: skip
_OF_LOGS = ("from_log", "reference_log", "truth_ratio", "out", "resume", "overwrite", "debug")
_POSITIVE = ("num_forget", "num_retain", "tokens_per_batch", "batch_size", "max_new_tokens")


def resolved(config: EvaluateConfig, *, given: bool = False) -> EvaluateConfig:
    """The settings, checked.

    Args:
        config: as the command line, a file or Python gave them.
        given: whether model and tokenizer are handed over as objects.

    Raises:
        UsageError: a setting that is missing, out of range, without effect, or contradicts another.
    """
    if config.resume and config.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: give one")
    if config.from_log is not None:
        _check_from_log(config)
        return config
    if config.reference_log is not None:
        raise UsageError("--reference-log goes with --from-log; a run of this command is given as --reference")
    if config.model is None and not given:
        raise UsageError("--model is needed: the folder of a model (or --from-log LOG.json to score a published log)")
    if config.forget is None:
        raise UsageError("--forget is needed: the split that was to be forgotten, such as forget01")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_name(name)} {value}: give at least 1")
    if not 0.0 < config.min_k <= 1.0:
        raise UsageError(f"--min-k {config.min_k}: give a fraction of an answer's tokens, above 0 and at most 1")
    if config.seed is not None and config.num_forget is None and config.num_retain is None:
        raise UsageError("--seed draws the rows of --num-forget and --num-retain; give one of them, or leave it out")
    # `tofu:forget01` is what other commands are given.
    return replace(config, forget=config.forget.removeprefix(f"{config.benchmark}:"))


def _check_from_log(config: EvaluateConfig) -> None:
    plain = EvaluateConfig()
    for field in fields(config):
        if field.name not in _OF_LOGS and getattr(config, field.name) != getattr(plain, field.name):
            raise UsageError(f"{flag_name(field.name)} has no effect with --from-log; leave it out")
