"""The settings of `python -m fillm.rank`: the one source of its flags, its YAML file and its Python arguments."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from fillm.config import flag_name, option
from fillm.data import DEFAULT_TEMPLATE
from fillm.errors import UsageError
from fillm.rank.sketching import check_sketching

Method = Literal[
    "soir", "soir-sum", "soir-per-sample", "first-order", "gradient", "memflex",
    "parameter-shift", "fisher-ratio", "wagle", "saliency", "path", "random", "none",
    "so-influence", "so-influence-sum", "so-influence-pd", "fo-influence", "param-deltas",
]  # fmt: skip
Compression = Literal[
    "none", "auto", "oporp", "countsketch", "sjlt", "gaussian", "rademacher",
    "factored", "factored-sjlt", "tensorsketch",
]  # fmt: skip
Granularity = Literal["tensor", "row", "head", "element"]
Objective = Literal["forget", "retain", "trade-off"]

PUBLISHED_NAMES = {
    "so-influence": "soir",
    "so-influence-sum": "soir-sum",
    "so-influence-pd": "soir-per-sample",
    "fo-influence": "first-order",
    "param-deltas": "parameter-shift",
}
WITH_UPDATE = ("soir", "soir-sum")  # methods that have a `u`
# Options that only these methods look at.
_OPTIONS_OF = {
    "damping": (*WITH_UPDATE, "soir-per-sample"),
    "tolerance": ("soir",),
    "base_model": ("parameter-shift",),
    "similarity": ("memflex",),
    "magnitude": ("memflex",),
    "mu": ("wagle",),
    "path_weight": ("path",),
    "path_rise": ("path",),
    "path_points": ("path",),
    "path_rounds": ("path",),
    "path_keep": ("path",),
}
_WOODBURY_TOO = ("woodbury", "soir-per-sample")
FORGET_ALONE = ("saliency", "gradient")  # methods that do not look at the retain set
SIGNED_SCORES = ("path",)  # methods that score by what may be below 0, the largest first
ON_CPU = "the model lies in CPU memory itself"
WITHOUT_GRADIENTS = ("parameter-shift", "random", "none")


@dataclass(frozen=True)
class RankConfig:
    """Rank a language model's parameters by what they hold of a forget set (second-order influence ranking)."""

    model: str | None = option(None, "path or Hub id of a causal LM; without it, the embedded default model", "PATH")
    adapter: str | None = option(None, "path or Hub id of a PEFT adapter", "PATH")
    tokenizer: str | None = option(None, "path or Hub id, if not the model's", "PATH")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option("float32", "dtype the model is loaded in")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = option(False, "allow a model folder's own Python code to run")
    forget: str | None = option(None, "data spec of the rows to forget", "SPEC")
    retain: str | None = option(None, "data spec of the rows to keep", "SPEC")
    data_root: str | None = option(None, "folder that holds tofu/ and knowundo/ (or set FILLM_DATA)", "DIR")
    template: str = option(DEFAULT_TEMPLATE, "prompt template, or chat for the tokenizer's own", "TEXT")
    num_forget: int | None = option(None, "use this many forget rows, drawn with --seed", "N")
    num_retain: int | None = option(None, "use this many retain rows, drawn with --seed", "N")
    seed: int = option(0, "seed of every draw", "N")
    max_length: int = option(512, "longest sample in tokens", "N")
    tokens_per_batch: int | None = option(None, "token budget of a batch, padding included (default: 2048)", "N")
    layout: Literal["right", "left", "packed"] = option("right", "how a batch is laid out; scores do not depend on it")
    method: Method = option(
        "soir",
        "localisation method; so-influence, so-influence-sum, so-influence-pd, fo-influence and param-deltas are the "
        "published names of soir, soir-sum, soir-per-sample, first-order and parameter-shift",
    )
    curvature: Literal["datainf", "woodbury", "diagonal"] = option("datainf", "inverse curvature applied")
    damping: float = option(0.1, "factor of the mean squared gradient entry, equation (1)", "X")
    damping_dimension: Literal["parameter", "sketch"] = option(
        "parameter", "what the damping divides by: the tensor's size, or the sketch's, as published code does"
    )
    score: Literal["l2", "mean-abs"] | None = option(None, "size of the update (default: l2; mean-abs for soir-sum)")
    loss_reduction: Literal["mean", "sum"] = option("mean", "over a sample's answer tokens")
    compression: Compression = option("none", "gradient sketch; auto picks kind and size for --memory")
    sketch_dim: int = option(4096, "numbers a gradient is compressed to; smaller tensors are kept as they are", "K")
    sketch_dtype: Literal["float32", "bfloat16"] = option("float32", "type that sketches are stored in")
    objective: Objective = option(
        "forget", "forget: largest |u|; retain: least damage; trade-off: damage at equal gain"
    )
    granularity: Granularity = option("tensor", "what is ranked")
    include: str | None = option(None, "comma-separated kinds or globs of tensor names in scope", "GLOBS")
    exclude: str | None = option(None, "comma-separated kinds or globs of tensor names left out", "GLOBS")
    tolerance: float = option(1e-3, "widest relative bracket of a certified score", "X")
    save_update: bool = option(False, "save u of every tensor in update.safetensors")
    base_model: str | None = option(None, "model before fine-tuning (parameter-shift)", "PATH")
    similarity: float = option(0.92, "largest cosine of forget and retain gradient (memflex)", "X")
    magnitude: float = option(6e-4, "smallest mean forget gradient entry (memflex)", "X")
    mu: float = option(1e-3, "stand-in for the Hessian diagonal (wagle)", "X")
    path_weight: float = option(3.0, "how many times damage counts against gain (path)", "X")
    path_rise: float = option(1.0, "rise of the forget loss up to which the step is followed, in nats (path)", "X")
    path_points: int = option(4, "points of the midpoint rule, a pass over each set at each (path)", "N")
    path_rounds: int = option(1, "leave weights out and follow the others anew so many times (path, element)", "N")
    path_keep: float = option(0.1, "fraction of the weights that is to be selected after --path-rounds", "X")
    store: str | None = option(None, "folder of a sketch store to build, to add to, or to rank from", "DIR")
    memory: str | None = option(
        None, "memory for sketches (--compression auto) or exact Gram matrices (default: half of what is free)", "SIZE"
    )
    groups: int = option(1, "rank the layers in this many groups, one after another, to spare memory", "N")
    offload: bool = option(False, "keep accumulators in page-locked CPU memory instead of on the GPU")
    shard: bool = option(False, "spread weights and accumulators over the processes of torchrun (FSDP2)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    strict: bool = option(False, "make warnings about the data errors")
    skip_bad_rows: bool = option(False, "leave out rows that cannot be used, counted and listed")
    out: str = option("runs/rank", "run folder to write", "DIR")
    resume: bool = option(False, "continue an interrupted run in --out")
    overwrite: bool = option(False, "replace an existing --out")
    dry_run: bool = option(False, "print passes, memory, FLOP, bytes moved and time; touch nothing")
    plan_devices: int | None = option(None, "devices that --dry-run plans for (default: the processes started)", "N")
    plan_flops: float | None = option(None, "FLOP/s of a device at matrix products (default: measured here)", "X")
    plan_bandwidth: float | None = option(None, "bytes/s of a device's memory (default: measured here)", "X")
    plan_link: float | None = option(None, "bytes/s that a device receives from the others", "X")
    checkpoint_seconds: float = option(120.0, "how often the state of a pass is saved", "S")
    debug: bool = option(False, "show a traceback with every error")

    @property
    def canonical_method(self) -> str:
        """The method's name here, whatever published name was given."""
        return PUBLISHED_NAMES.get(self.method, self.method)

    @property
    def effective_score(self) -> str:
        """`score`, or the method's own."""
        return self.score or ("mean-abs" if self.canonical_method == "soir-sum" else "l2")

    @property
    def sketched(self) -> bool:
        """Whether inner products come from sketches."""
        return self.compression != "none" or self.store is not None

    @property
    def exact_gram(self) -> bool:
        """Whether exact Gram matrices are needed."""
        asks = self.canonical_method in ("soir-per-sample", "first-order") or self.curvature == "woodbury"
        return asks and not self.sketched

    @property
    def memory_before_time(self) -> bool:
        """Whether an option is given that takes longer for less memory: the allocator is then told the same."""
        return self.shard or self.gradient_checkpointing

    @property
    def asks_for_update(self) -> bool:
        """Whether something is asked for that inner products with `u` do not tell."""
        return self.save_update or self.granularity != "tensor" or self.effective_score != "l2"

    @property
    def needs_update(self) -> bool:
        """Whether `u` itself is needed, not only its norm."""
        return self.canonical_method in WITH_UPDATE and (
            self.canonical_method == "soir-sum"
            or self.asks_for_update
            or self.objective != "forget"
            or self.curvature == "diagonal"
        )


def _why_no_score(config: RankConfig) -> str | None:
    """Why nothing is scored by the size of a vector, None if something is."""
    method = config.canonical_method
    if method not in (*WITH_UPDATE, "parameter-shift"):
        return f"--method {method} has a score of its own"
    if config.granularity == "element":
        return "at --granularity element a score is the size of one weight's step"
    if config.objective != "forget":
        return f"--objective {config.objective} scores what a step changes, not its size"
    return None


def check(config: RankConfig) -> None:
    """Refuses what cannot be honoured.

    Raises:
        UsageError: naming the option.
    """
    method = config.canonical_method
    check_sketching(config)
    if not math.isfinite(config.similarity) or not math.isfinite(config.magnitude):
        raise UsageError("--similarity and --magnitude must be finite")
    _check_groups(config)
    _check_offload(config)
    if config.curvature != "datainf" and method != "soir" and (config.curvature, method) != _WOODBURY_TOO:
        raise UsageError(f"--curvature {config.curvature} is a choice of --method soir, not of {method}")
    if config.objective != "forget" and method not in WITH_UPDATE:
        raise UsageError(
            f"--objective {config.objective} needs a method with an update u (soir, soir-sum), not {method}"
        )
    if config.save_update and method not in WITH_UPDATE:
        raise UsageError(f"--save-update needs a method with an update u (soir, soir-sum), not {method}")
    if config.score is not None and (unused := _why_no_score(config)):
        raise UsageError(f"--score {config.score} has no effect: {unused}; leave it out")
    for field in dataclasses.fields(config):
        methods, value = _OPTIONS_OF.get(field.name, (method,)), getattr(config, field.name)
        if method not in methods and value != field.default:
            raise UsageError(
                f"{flag_name(field.name)} {value} has no effect: it is a choice of --method {' and '.join(methods)}, "
                f"not of {method}; leave it out"
            )
    if method == "parameter-shift" and not config.base_model:
        raise UsageError("--method parameter-shift needs --base-model, the model before fine-tuning")
    if method in ("random", "none", "memflex", "soir-per-sample", "first-order") and config.granularity != "tensor":
        raise UsageError(f"--method {method} ranks whole tensors; use --granularity tensor")
    if config.resume and config.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: give one")
    if method == "path" and config.dtype in ("bfloat16", "float16") and config.adapter is None:
        raise UsageError(f"--method path moves weights by less than {config.dtype} can tell apart; use --dtype float32")
    if config.path_rounds != 1 and config.granularity != "element":
        raise UsageError(f"--path-rounds {config.path_rounds} leaves out single weights; use --granularity element")
    if config.path_rounds == 1 and config.path_keep != RankConfig.path_keep:
        raise UsageError(f"--path-keep {config.path_keep} has no effect without --path-rounds; leave it out")
    if not 0 < config.path_keep < 1:
        raise UsageError(f"--path-keep must be between 0 and 1, not {config.path_keep}")
    _check_planned(config)
    for name in ("damping", "tolerance", "mu", "path_weight", "path_rise", "checkpoint_seconds"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            needed = "finite" if value == math.inf else "above 0"
            raise UsageError(f"--{name.replace('_', '-')} must be {needed}, not {value}")
    if not 1e-12 <= config.damping <= 1e12:
        raise UsageError(f"--damping must be between 1e-12 and 1e12, not {config.damping}")
    for name in ("num_forget", "num_retain", "tokens_per_batch", "max_length", "path_points", "path_rounds"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def _check_groups(config: RankConfig) -> None:
    if config.groups < 1:
        raise UsageError(f"--groups must be at least 1, not {config.groups}")
    if config.groups == 1:
        return
    method, why = config.canonical_method, None
    if method in WITHOUT_GRADIENTS:
        why = f"--method {method} accumulates no gradients"
    elif config.sketched:
        why = "sketches are of all tensors in scope at once"
    elif config.exact_gram and not config.asks_for_update:
        why = "exact inner products are taken in groups of tensors that fit --memory"
    elif method == "path":
        why = "--method path moves all weights in scope together"
    if why is not None:
        raise UsageError(f"--groups {config.groups} is not taken here: {why}; leave it out")


def _check_offload(config: RankConfig) -> None:
    method = config.canonical_method
    if not config.offload:
        return
    refused = [
        (method in WITHOUT_GRADIENTS, f"--method {method} accumulates no gradients"),
        (method == "path", "--method path reads its accumulators at every weight"),
        (config.sketched or config.exact_gram, "inner products from sketches or Gram matrices stay on the GPU"),
        (config.shard, "--shard spreads accumulators over the processes"),
        (config.device == "cpu", ON_CPU),
    ]
    if (why := next((reason for no, reason in refused if no), None)) is not None:
        raise UsageError(f"--offload is not taken here: {why}; leave it out")


def _check_planned(config: RankConfig) -> None:
    for name in ("plan_devices", "plan_flops", "plan_bandwidth", "plan_link"):
        value = getattr(config, name)
        if value is not None and not config.dry_run:
            raise UsageError(f"{flag_name(name)} {value} has no effect without --dry-run; leave it out")
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{flag_name(name)} must be above 0 and finite, not {value}")


def check_link(config: RankConfig, devices: int) -> None:
    """Refuses the rate of what other devices send where there are none.

    Raises:
        UsageError: naming the option.
    """
    if config.plan_link is not None and devices == 1:
        raise UsageError(
            f"--plan-link {config.plan_link} has no effect on one device; say on how many with --plan-devices N, or "
            "leave it out"
        )


def check_sharded(config: RankConfig, processes: int) -> None:
    """Refuses what is not computed from weights and sums that lie spread over the processes.

    Raises:
        UsageError: naming the option.
    """
    if config.dry_run and processes == 1:
        raise UsageError("--shard --dry-run plans for several devices; say for how many with --plan-devices N")
    if processes == 1:
        raise UsageError(
            "--shard spreads the model over several processes; start them with torchrun --nproc-per-node N"
        )
    method = config.canonical_method
    refused = [
        (method in ("path", "soir-per-sample", "first-order"), f"--method {method}"),
        (config.curvature == "woodbury", f"--curvature {config.curvature}"),
        (config.adapter is not None, "--adapter"),
        (config.compression != "none", f"--compression {config.compression}"),
        (config.store is not None, "--store"),
    ]
    if (given := next((option for no, option in refused if no), None)) is not None:
        raise UsageError(
            f"--shard does not take {given}: it ranks by means and sums of gradients alone; leave one of them out"
        )
