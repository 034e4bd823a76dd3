"""`--dry-run`: what a run will take before it is started. Memory, FLOP, time, a line each; no data goes to a device."""

from collections.abc import Mapping, Sequence

import fillm_kernels
from fillm_kernels.ghost_norm import BLOCK_ENTRIES
from torch import nn

from fillm.data import SampleSet, check_fits_model
from fillm.models import TensorInfo, catalogue, resolve_device, select_tensors
from fillm.rank.activations import saved_activation_bytes
from fillm.rank.config import WITHOUT_GRADIENTS, RankConfig
from fillm.rank.console import Console
from fillm.rank.costs import (
    BatchShape,
    Costs,
    accumulator_bytes,
    batch_shapes,
    estimated_activation_bytes,
)
from fillm.rank.gram_groups import check_planned
from fillm.rank.gram_sources import memory_budget, needs_mean, retain_left, sketch_maps
from fillm.rank.machine import measured_rate, resident_bytes
from fillm.rank.path_step import MOST_LENGTHS
from fillm.rank.plan_lines import PassPlan, Plan
from fillm.rank.plan_passes import passes_of, planned
from fillm.rank.sketch_choice import chosen_for_memory, sketch_bytes
from fillm.rank.unloaded_model import meta_model
from fillm.statistics.store_writer import BLOCK_BYTES

_LOGIT_COPIES = 3  # logits, their rows with an answer in float32, and the softmax; in the backward as many gradients
_SCALAR_BYTES = 16  # q and d, float64
_SLACK = 0.15  # of the activations: what malloc holds beyond what it was asked for, measured on glibc


def plan(
    model: nn.Module,
    scope: Sequence[TensorInfo],
    sets: Mapping[str, SampleSet],
    config: RankConfig,
    *,
    rate: float,
    program_bytes: int = 0,
    device_type: str = "cpu",
) -> Plan:
    """Works out a run without starting it.

    Args:
        model: with values or on the meta device; only shapes are read.
        scope: tensors to rank.
        sets: `forget` and `retain`, those that the method needs.
        config: the run's settings.
        rate: FLOP/s for the time.
        program_bytes: what the process holds besides.
        device_type: `cpu` or `cuda`.

    Returns:
        The plan. FLOP count matrix products only: forward, backward of the activations, products (5) and (6), ghost
        norms (4), attention; a multiplication and an addition are two.

    Raises:
        UsageError: if `--memory` does not hold what the run needs at least.
    """
    if config.canonical_method in WITHOUT_GRADIENTS:
        sets = {}
    everything = catalogue(model)
    counts = [len(sets[which]) if which in sets else 0 for which in ("forget", "retain")]
    config, choice = chosen_for_memory(config, scope, sum(counts), counts[1])
    costs = Costs.of(model, everything, scope)
    shapes = {which: batch_shapes(s, config.tokens_per_batch, config.layout) for which, s in sets.items()}
    passes = [
        planned(one, sets[one.which], shapes[one.which], costs, config.gradient_checkpointing)
        for one in passes_of(config)
        if one.which in sets
    ]
    memory = {"weights": sum(p.numel() * p.element_size() for p in model.parameters())}
    notes = [choice] if choice else []
    if config.canonical_method == "parameter-shift":
        memory["weights of the base model"] = memory["weights"]
    memory |= _accumulators(config, scope, model, sets)
    if config.exact_gram and sets:
        check_planned(model, scope, [one for some in shapes.values() for one in some], memory_budget(config))
        kept, flop = costs.gram_matrices(list(shapes.values()))
        memory["gradients kept, a group of tensors at a time"] = min(kept, memory_budget(config))
        samples, tokens = sum(counts), sum(one.tokens for one in passes[: len(sets)])
        passes.append(PassPlan("Gram matrices", samples, tokens, 0, {"Gram matrices": flop}))
    every = [shape for batches in shapes.values() for shape in batches]
    if every:
        memory["activations"], counted = _activations(model, everything, every, config.gradient_checkpointing)
        vocabulary = _vocabulary(model)
        rows = max(shape.answered for shape in every)
        logits = 4 * _LOGIT_COPIES * rows * vocabulary
        memory[f"logits ({rows} rows x {vocabulary}, {_LOGIT_COPIES} copies)"] = logits
        memory["buffers of the backward pass"] = _buffers(costs, every, device_type)
        if device_type == "cpu":
            memory["allocator slack"] = int(_SLACK * (memory["activations"] + logits))
        notes.append(f"activations are {'counted on the graph' if counted else 'estimated from shapes'}")
        if config.exact_gram:
            notes.append("exact Gram matrices: a pass over each set for every group of tensors whose gradients fit")
        elif config.canonical_method == "soir" and not (config.needs_update or config.sketched):
            notes.append("a pass over what the bracket does not certify comes on top")
        elif config.canonical_method == "path":
            notes.append(f"the search of a step's length takes at most {MOST_LENGTHS} passes, mostly fewer")
    if program_bytes:
        memory["program"] = program_bytes
    return Plan(len(scope), sum(info.numel for info in scope), tuple(passes), memory, rate, tuple(notes))


def plan_run(config: RankConfig, sets: Mapping[str, SampleSet], console: Console, rate: float | None = None) -> Plan:
    """Prints the plan of a run; of the model only its configuration is read.

    Args:
        config: the run's settings, with a model.
        sets: the tokenised samples.
        console: where the lines go.
        rate: FLOP/s; measured on the run's device if not given.

    Returns:
        The plan.

    Raises:
        DataError: if the samples do not fit the model.
        ModelError: if the model's or the adapter's configuration cannot be read.
        UsageError: if nothing is in scope or the device is not there.
    """
    device = resolve_device(config.device)
    model = meta_model(config)
    for which, samples in sets.items():
        check_fits_model(samples, model, f"--{which}")
    scope = select_tensors(catalogue(model), config.include, config.exclude)
    if config.sketched:
        retain = sets.get("retain", SampleSet([], "none"))
        settled, _ = chosen_for_memory(config, scope, len(sets["forget"]) + len(retain), len(retain))
        _, left = retain_left(settled, sketch_maps(settled, scope), retain, None)
        sets = {which: samples for which, samples in sets.items() if which != "retain" or len(left)}
        if "retain" in sets:  # a store spares a pass over the others
            sets["retain"] = sets["retain"][left.start : left.stop]
    program = resident_bytes() if device.type == "cpu" else 0
    rate = measured_rate(device) if rate is None else rate
    found = plan(model, scope, sets, config, rate=rate, program_bytes=program, device_type=device.type)
    console.say("\n".join(found.lines()))
    return found


def _accumulators(
    config: RankConfig, scope: Sequence[TensorInfo], model: nn.Module, sets: Mapping[str, SampleSet]
) -> dict[str, int]:
    if not sets:
        return {}
    itemsize = max(4, next(iter(model.parameters())).element_size())
    plain = accumulator_bytes(scope, itemsize)
    if config.sketched:
        return _sketch_memory(config, scope, sets, plain)
    if config.exact_gram:
        return {"Gram matrix of a tensor, twice": 16 * sum(len(some) for some in sets.values()) ** 2}
    if config.canonical_method == "gradient":
        return {"mean absolute forget gradient": plain}
    if config.canonical_method == "path":
        signs = sum(info.numel for info in scope)
        out = {"contributions of the weights": plain, "weights as they came": plain, "signs of the step": signs}
        return out | ({"scores of what is left out, and its round": plain + signs} if config.path_rounds > 1 else {})
    if config.canonical_method == "fisher-ratio":
        return {"diagonal Fisher of the forget set": plain, "diagonal Fisher of the retain set": plain}
    out = {"mean forget gradient v": plain}
    if config.canonical_method == "soir" and config.curvature == "diagonal":
        out |= {"diagonal Fisher of the retain set": plain, "update u": plain}
    elif config.canonical_method == "soir":
        out["weighted sums"] = accumulator_bytes(scope, itemsize, expanded=True)
        out["two scalars a sample and tensor"] = _SCALAR_BYTES * len(sets["retain"]) * len(scope)
    elif config.canonical_method != "saliency":
        out["mean retain gradient"] = plain
    if config.canonical_method == "soir-sum":
        out["update u"] = plain
    if config.objective != "forget" and config.granularity == "element":
        out["step moments per weight"] = 2 * plain
    return out


def _sketch_memory(
    config: RankConfig, scope: Sequence[TensorInfo], sets: Mapping[str, SampleSet], mean: int
) -> dict[str, int]:
    size = 2 if config.sketch_dtype == "bfloat16" else 4
    wants_mean = needs_mean(config.canonical_method) and config.damping_dimension == "parameter"
    out = {"mean forget gradient v": mean} if wants_mean else {}
    out["sketches of the forget set"] = sketch_bytes(scope, config.sketch_dim, len(sets["forget"]), 4)
    retain = len(sets["retain"]) if "retain" in sets else 0
    if config.store is None:
        out["sketches of the retain set"] = sketch_bytes(scope, config.sketch_dim, retain, size)
    elif "retain" in sets:
        most = max((min(info.numel, config.sketch_dim) for info in scope), default=0)
        out["a block of the store"] = BLOCK_BYTES + size * most
    return out


def _activations(
    model: nn.Module, infos: Sequence[TensorInfo], shapes: Sequence[BatchShape], checkpointing: bool
) -> tuple[int, bool]:
    """Bytes of the costliest batch, and whether they were counted rather than estimated."""
    # What is kept grows with R T and with R T^2: the largest of either kind are the candidates.
    sizes = {(shape.rows, shape.width) for shape in shapes}
    candidates = {max(sizes, key=lambda s: (s[0] * s[1], s)), max(sizes, key=lambda s: (s[0] * s[1] ** 2, s))}
    counts = [saved_activation_bytes(model, *size) for size in sorted(candidates)]
    counted = all(count is not None for count in counts)
    most = max(
        count if count is not None else estimated_activation_bytes(model, infos, *size)
        for count, size in zip(counts, sorted(candidates), strict=True)
    )
    layers = 1 + max((info.layer for info in infos), default=0)
    if checkpointing and layers > 1:  # the inputs of all layers, and one layer in full
        hidden = model.get_input_embeddings().weight.shape[1] * next(iter(model.parameters())).element_size()
        most = most // layers + layers * hidden * max(rows * width for rows, width in candidates)
    return most, counted


def _buffers(costs: Costs, shapes: Sequence[BatchShape], device_type: str) -> int:
    """Output gradients scaled for (6), and, where torch's operators take the norms, their padded copies."""
    native = fillm_kernels.backends()["ghost_norm"]["used"].get(device_type) not in (None, "torch", "reference")
    most = 0
    for shape in shapes:
        for inputs, outputs, use, is_head in set(costs.scoped_shapes):
            tokens = (shape.answered if is_head else shape.rows * shape.width) * use
            copies = 0 if native else min(tokens * (inputs + outputs), 2 * BLOCK_ENTRIES)
            most = max(most, int(4 * (tokens * outputs + copies)))
    return most


def _vocabulary(model: nn.Module) -> int:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = output if output is not None else model.get_input_embeddings()
    return int(embedding.weight.shape[0])
