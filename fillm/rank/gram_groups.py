"""Which tensors' gradients are kept at a time: as many as the memory holds, for each group costs a pass a set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fillm.capture import Capture
from fillm.data import SampleSet, collate, plan_batches
from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank.costs import BatchShape
from fillm.rank.passes import Passes
from fillm.rank.plan_lines import in_bytes
from fillm.statistics import KeptGradients, accumulator_dtype, held_tensors

ID_BYTES = 8  # of the token that an embedding's row belongs to


@dataclass(frozen=True)
class Sizes:
    """What there is to keep, in the numbers that memory is in proportion to.

    Attributes:
        samples: of both sets.
        tokens: of both sets, with the padding that stands in a batch.
        answers: tokens that carry loss, which are all that the head sees.
    """

    samples: int
    tokens: int
    answers: int

    @classmethod
    def of(cls, passes: Passes, capture: Capture, sets: Sequence[SampleSet]) -> "Sizes":
        """As the passes will batch them."""
        padded = passes.layout != "packed" and not capture.alone
        tokens = 0
        for samples in sets:
            lengths = [sample.num_tokens for sample in samples]
            plan = plan_batches(lengths, passes.tokens_per_batch, shuffle_seed=passes.shuffle_seed) if padded else []
            tokens += sum(len(some) * max(lengths[i] for i in some) for some in plan) if padded else sum(lengths)
        every = [sample for samples in sets for sample in samples]
        return cls(len(every), tokens, sum(sample.num_counted for sample in every))


@dataclass(frozen=True)
class Group:
    """Tensors that one pass over each set keeps.

    Attributes:
        names: of the tensors, in the order of the model.
        formed: those that are kept entry by entry, which takes less than their factors.
    """

    names: tuple[str, ...]
    formed: frozenset[str]


def gram_groups(
    passes: Passes, capture: Capture, names: Sequence[str], sets: Sequence[SampleSet], memory_bytes: int
) -> list[Group]:
    """Fills group after group, in the order of the model, so that tensors with the same input share it.

    What a tensor takes is read off one sample, run through the model, and scaled to both sets.

    Raises:
        UsageError: if a tensor alone exceeds the memory.
    """
    sizes = Sizes.of(passes, capture, sets)
    if not names or not sizes.samples:
        return [Group(tuple(names), frozenset())] if names else []
    factors = _factors(capture, names, sets, sizes)
    users = Counter(storage for held in factors.values() for storage in held)
    share = {name: sum(size / users[one] for one, size in held.items()) for name, held in factors.items()}
    formed = frozenset(name for name in names if _formed_bytes(capture, name, sizes) < share[name])
    for name in formed:
        factors[name] = {(name,): _formed_bytes(capture, name, sizes)}
    _refuse_too_large({name: sum(factors[name].values()) for name in names}, sizes.samples, memory_bytes)
    groups: list[list[str]] = []
    held: dict[tuple[object, ...], int] = {}
    for name in names:
        held |= factors[name]
        if not groups or sum(held.values()) > memory_bytes:
            groups.append([])
            held = dict(factors[name])
        groups[-1].append(name)
    return [Group(tuple(some), formed & set(some)) for some in groups]


def check_planned(
    model: nn.Module, scope: Sequence[TensorInfo], shapes: Sequence[BatchShape], memory_bytes: int
) -> None:
    """Refuses what `gram_groups` would, from shapes alone: the least that a tensor's gradients can take.

    Args:
        model: of which only shapes are read.
        scope: tensors to rank; of experts, whose tokens are not known before, nothing is said.
        shapes: the batches of both sets.
        memory_bytes: as `gram_groups` has it.

    Raises:
        UsageError: if a tensor alone exceeds the memory.
    """
    samples = sum(len(shape.lengths) for shape in shapes)
    tokens, answers = (sum(getattr(s, name) for s in shapes) for name in ("tokens", "answered"))
    parameters = dict(model.named_parameters())
    output = getattr(model, "get_output_embeddings", lambda: None)()
    least = {}
    for info in scope:
        dtype = parameters[info.name].dtype
        formed = samples * info.numel * accumulator_dtype(dtype).itemsize
        factors = dtype.itemsize * sum(info.shape[-2:]) * tokens
        if info.kind == "embed":
            factors = (dtype.itemsize * info.shape[-1] + ID_BYTES) * tokens
        if output is not None and parameters[info.name] is output.weight:
            looked_up = factors if info.kind == "embed" else 0
            factors = dtype.itemsize * sum(info.shape[-2:]) * answers + looked_up
        if info.kind != "expert":
            least[info.name] = formed if len(info.shape) < 2 else min(formed, factors)
    _refuse_too_large(least, samples, memory_bytes)


def _refuse_too_large(taken: Mapping[str, int], samples: int, memory_bytes: int) -> None:
    most = max(taken, key=lambda name: taken[name], default=None)
    if most is not None and taken[most] > memory_bytes:
        raise UsageError(
            f"--memory {in_bytes(memory_bytes)}: the gradients of {most} of all {samples} samples take "
            f"{in_bytes(taken[most])}; give --memory {-(-taken[most] >> 20)}MiB or more, fewer samples, or "
            f"--exclude {most}"
        )


def _formed_bytes(capture: Capture, name: str, sizes: Sizes) -> int:
    parameter = capture.parameters[name]
    return sizes.samples * parameter.numel() * accumulator_dtype(parameter.dtype).itemsize


def _factors(
    capture: Capture, names: Sequence[str], sets: Sequence[SampleSet], sizes: Sizes
) -> Mapping[str, dict[tuple[object, ...], int]]:
    """Of every tensor, the storages, by an identity that tensors with the same input share; bytes for all samples."""
    longest = [max(samples, key=lambda sample: sample.num_tokens, default=None) for samples in sets]
    which = max((i for i, one in enumerate(longest) if one is not None), key=lambda i: longest[i].num_tokens)
    position = sets[which].index(longest[which])
    probed = KeptGradients()
    restricted = capture.like(names)
    restricted.run(collate(sets[which], [position]), sets[which], probed.observe)
    capture.fallback |= restricted.fallback
    tokens, answers = longest[which].num_tokens, longest[which].num_counted

    def scaled(tensor: Tensor) -> int:
        rows = tensor.shape[0]
        ratio = sizes.answers / answers if rows == answers else sizes.tokens / tokens
        return int(tensor.nbytes * (sizes.samples if rows == 1 else ratio))

    out: dict[str, dict[tuple[object, ...], int]] = {}
    for name in names:
        held = [tensor for gradients, _ in probed.kept.get(name, []) for tensor in held_tensors(gradients)]
        out[name] = {(t.untyped_storage().data_ptr(),): scaled(t) for t in held}
        if not held:  # an expert that this sample did not come by, or a tensor that none does
            parameter = capture.parameters[name]
            matrix, vector = sum(parameter.shape[-2:]) * sizes.tokens, parameter.numel() * sizes.samples
            out[name] = {(name,): (matrix if parameter.ndim > 1 else vector) * parameter.element_size()}
    return out
