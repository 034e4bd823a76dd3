"""`--dry-run`: what a run will take before it is started, a line each; no data goes to a device."""

from collections.abc import Mapping, Sequence

import fillm_kernels
import torch
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
from fillm.rank.layer_groups import layer_groups
from fillm.rank.machine import measured_bandwidth, measured_rate, program_bytes
from fillm.rank.path_step import MOST_LENGTHS
from fillm.rank.plan_devices import Devices
from fillm.rank.plan_groups import largest, passes_of_all
from fillm.rank.plan_lines import PassPlan, Plan, Rates, in_bytes
from fillm.rank.plan_passes import passes_of
from fillm.rank.plan_shards import check_bytes, gathered_bytes
from fillm.rank.plan_traffic import Traffic, planned
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
    rates: Rates,
    program_bytes: int = 0,
    device_type: str = "cpu",
    devices: int = 1,
) -> Plan:
    """Works out a run without starting it.

    Args:
        model: with values or on the meta device; only shapes are read.
        scope: tensors to rank.
        sets: `forget` and `retain`, those that the method needs.
        config: the run's settings.
        rates: for the time.
        program_bytes: what the process holds besides.
        device_type: `cpu` or `cuda`.
        devices: that the samples are dealt out to, and with `config.shard` weights and accumulators divided.

    Returns:
        The plan, of memory and work that of the device which has most. FLOP count matrix products only: forward,
        backward of the activations, products (5) and (6), ghost norms (4), attention; a multiplication and an addition
        are two.

    Raises:
        ModelError: of a model that is not sharded.
        UsageError: if `--memory` does not hold what the run needs at least.
    """
    if config.canonical_method in WITHOUT_GRADIENTS:
        sets = {}
    everything = catalogue(model)
    counts = [len(sets[which]) if which in sets else 0 for which in ("forget", "retain")]
    config, choice = chosen_for_memory(config, scope, sum(counts), counts[1])
    costs = Costs.of(model, everything, scope)
    over = Devices(devices, config.shard)
    shapes = {which: batch_shapes(s, config.tokens_per_batch, config.layout) for which, s in sets.items()}
    for batches in shapes.values():
        batches.sort(key=lambda shape: -shape.answered)  # the order of a pass
    every = [shape for batches in shapes.values() for shape in batches]
    kept, counted = _activations(model, everything, every, config.gradient_checkpointing) if every else (0, True)
    densest = max((shape.tokens for shape in every), default=1)
    groups = [scope] if config.groups == 1 else layer_groups(scope, config.groups)
    by_group = []
    for infos in groups:
        of_group = costs if infos is scope else Costs.of(model, everything, infos)
        traffic = Traffic.of(model, everything, infos, over, kept / densest, _vocabulary(model) if every else 0)
        by_group.append([
            planned(one, sets[one.which], shapes[one.which], of_group, traffic, config.gradient_checkpointing)
            for one in passes_of(config)
            if one.which in sets
        ])  # fmt: skip
    passes = passes_of_all(by_group)
    weights = {"weights": sum(over.held(p.shape) * p.element_size() for p in model.parameters())}
    stacks = [p for p in everything if p.kind == "expert" and len(p.shape) == 3]
    if stacks and device_type == "cpu" and not over.sharded:
        # Files hold every expert by itself. They stay mapped for the other weights, which are not copied.
        itemsize = next(iter(model.parameters())).element_size()
        weights["experts as the files hold them"] = sum(info.numel for info in stacks) * itemsize
    memory = dict(weights)
    notes = [choice] if choice else []
    if config.canonical_method == "parameter-shift":
        memory["weights of the base model"] = memory["weights"]
    memory |= largest([_accumulators(config, infos, model, sets, over) for infos in groups])
    if config.exact_gram and sets:
        check_planned(model, scope, [one for some in shapes.values() for one in some], memory_budget(config))
        kept, flop = costs.gram_matrices(list(shapes.values()))
        memory["gradients kept, a group of tensors at a time"] = min(kept, memory_budget(config))
        samples, tokens = sum(counts), sum(one.tokens for one in passes[: len(sets)])
        passes.append(PassPlan("Gram matrices", samples, tokens, 0, {"Gram matrices": flop / devices}))
    if every:
        memory["activations"] = kept
        vocabulary = _vocabulary(model)
        rows = max(shape.answered for shape in every)
        logits = 4 * _LOGIT_COPIES * rows * vocabulary
        memory[f"logits ({rows} rows x {vocabulary}, {_LOGIT_COPIES} copies)"] = logits
        memory["buffers of the backward pass"] = _buffers(costs, every, device_type)
        if over.sharded:
            memory |= gathered_bytes(model, scope, over, _wide(model), densest, logits)
        if device_type == "cpu" and not config.memory_before_time:
            memory["allocator slack"] = int(_SLACK * (kept + logits))
        memory, more = _larger(memory, weights | _check_memory(model, groups, over, device_type))
        notes += more
        if len(groups) > 1:
            notes.append(
                "accumulators are those of the largest group; a backward pass ends at its group, and is counted whole"
            )
        notes.append(
            "what a batch keeps for its backward pass is "
            + ("counted in the model's own graph" if counted else "estimated from shapes: the model needs its values")
        )
        if config.exact_gram:
            notes.append("exact Gram matrices: a pass over each set for every group of tensors whose gradients fit")
        elif config.canonical_method == "soir" and not (config.needs_update or config.sketched):
            notes.append("a pass over what the bracket does not certify comes on top")
        elif config.canonical_method == "path":
            notes.append(f"the search of a step's length takes at most {MOST_LENGTHS} passes, mostly fewer")
    if program_bytes:
        memory["program"] = program_bytes
    numel = sum(info.numel for info in scope)
    return Plan(len(scope), numel, tuple(passes), memory, rates, tuple(notes), devices)


def plan_run(config: RankConfig, sets: Mapping[str, SampleSet], console: Console, devices: int = 1) -> Plan:
    """Prints the plan of a run; of the model only its configuration is read.

    Args:
        config: the run's settings, with a model.
        sets: the tokenised samples.
        console: where the lines go.
        devices: that the run is to have.

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
    rates = _rates(config, device)
    program = program_bytes() if device.type == "cpu" else 0
    found = plan(
        model, scope, sets, config,
        rates=rates, program_bytes=program, device_type=device.type, devices=devices,
    )  # fmt: skip
    console.say("\n".join(found.lines()))
    return found


def _rates(config: RankConfig, device: torch.device) -> Rates:
    """Those given, and those measured on the device for the others."""
    given = {"flops": config.plan_flops, "bandwidth": config.plan_bandwidth}
    measured = [name for name, value in given.items() if value is None]
    flops = measured_rate(device) if given["flops"] is None else given["flops"]
    bandwidth = measured_bandwidth(device) if given["bandwidth"] is None else given["bandwidth"]
    return Rates(flops, bandwidth, config.plan_link, measured)


def _check_memory(
    model: nn.Module, groups: Sequence[Sequence[TensorInfo]], devices: Devices, device_type: str
) -> dict[str, int]:
    """What the check before the passes takes beside the weights, but for two samples' activations."""
    if devices.sharded:  # tensors of one group at a time
        return largest([check_bytes(model, infos, devices, _wide(model)) for infos in groups])
    if device_type == "cuda":  # the copy lies in CPU memory where the device has no room
        return {}
    narrow = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    return {"copy in float32, to compare gradients": 4 * sum(p.numel() for p in model.parameters())} if narrow else {}


def _larger(passes: dict[str, int], check: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """The memory of whichever takes more, and a note where that is the check."""
    if sum(check.values()) <= sum(passes.values()):
        return passes, []
    note = f"the peak is that of the check before the passes; the passes take {in_bytes(sum(passes.values()))}"
    return check, [note]


def _wide(model: nn.Module) -> int:
    """Bytes of an accumulator's entry."""
    return max(4, next(iter(model.parameters())).element_size())


def _accumulators(
    config: RankConfig, scope: Sequence[TensorInfo], model: nn.Module, sets: Mapping[str, SampleSet], devices: Devices
) -> dict[str, int]:
    if not sets:
        return {}
    itemsize = _wide(model)
    plain = accumulator_bytes(scope, itemsize, devices=devices)
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
        out["weighted sums"] = accumulator_bytes(scope, itemsize, expanded=True, devices=devices)
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
