"""Ranking a few layers at a time, so that accumulators of all tensors never exist at once (`--groups`).

Every group takes all of the method's passes with its own tensors captured alone. The backward pass ends at the lowest
of them; the layers above are gone through for their activations.
"""

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from fillm.errors import UsageError
from fillm.models import TensorInfo
from fillm.rank.scoring import Job, Scores


def layer_groups(scope: Sequence[TensorInfo], count: int) -> list[list[TensorInfo]]:
    """Splits tensors into groups of neighbouring layers, so that the largest group has as few weights as can be.

    A layer is never split. What stands in no layer is two more parts: embeddings with what their names call so, below
    the first layer, and norm, head and the rest above the last.

    Args:
        scope: tensors to rank.
        count: number of groups.

    Returns:
        The groups, the lowest layers first; in each the tensors in the order of `scope`.

    Raises:
        UsageError: if there are fewer parts than groups.
    """
    parts: dict[tuple[int, int], list[TensorInfo]] = {}
    for info in scope:
        parts.setdefault(_place(info), []).append(info)
    places = sorted(parts)
    if count > len(places):
        raise UsageError(
            f"--groups {count}: the {len(scope)} tensors in scope lie in {len(places)} layers (what stands below "
            f"them counts as one, and so does what stands above); give --groups {len(places)} or less"
        )
    order = {info.name: position for position, info in enumerate(scope)}
    cuts = _cuts([sum(info.numel for info in parts[place]) for place in places], count)
    joined = [[info for place in places[begin:end] for info in parts[place]] for begin, end in cuts]
    return [sorted(group, key=lambda info: order[info.name]) for group in joined]


def _place(info: TensorInfo) -> tuple[int, int]:
    """Where in the model a tensor stands: below the layers, in one of them, or above."""
    if info.layer >= 0:
        return 1, info.layer
    return (0 if info.kind == "embed" or "embed" in info.name else 2), 0


def _cuts(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Cuts a sequence into `count` pieces, none empty, whose largest sum is as small as can be; first cut first."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    best = {(1, end): (ends[end], 0) for end in range(1, len(ends))}  # (largest sum, where the last piece begins)
    for pieces in range(2, count + 1):
        for end in range(pieces, len(ends)):
            best[pieces, end] = min(
                (max(best[pieces - 1, begin][0], ends[end] - ends[begin]), begin) for begin in range(pieces - 1, end)
            )
    cuts, end = [], len(sizes)
    for pieces in range(count, 0, -1):
        begin = best[pieces, end][1]
        cuts.append((begin, end))
        end = begin
    return cuts[::-1]


def in_groups(job: Job, method: Callable[[Job], Scores]) -> Scores:
    """What a method says of all tensors in scope, from one group of layers at a time."""
    count = job.config.groups
    if count == 1:
        return method(job)
    out, largest = Scores([]), job.largest
    groups = layer_groups(job.scope, count)
    for number, infos in enumerate(groups, start=1):
        capture = job.capture.like([info.name for info in infos])
        with job.passes.within_group(number, count):
            part = method(dataclasses.replace(job, scope=infos, capture=capture, largest=largest))
        job.capture.fallback |= capture.fallback
        largest = max([largest, *part.sizes.values()])
        part.update = _set_aside(job, f"update-{number}", part.update)
        out.add(part)
    out.record["groups"] = [
        {"tensors": len(infos), "weights": sum(info.numel for info in infos), "layers": _layers(infos)}
        for infos in groups
    ]
    return out


def _set_aside(job: Job, name: str, update: dict[str, Tensor]) -> dict[str, Tensor]:
    """A group's updates off the device: on the disk if there is a run folder, which one of several processes writes."""
    if not job.passes.processes.first or not update:
        return {}
    if job.passes.folder is not None:
        return job.passes.folder.set_aside(name, update)
    return {name: tensor.cpu() for name, tensor in update.items()}


def _layers(infos: Sequence[TensorInfo]) -> str:
    """What a group is made of: `embeddings, 0 to 3`, `31, above`."""
    places = sorted({_place(info) for info in infos})
    numbers = [number for where, number in places if where == 1]
    named = [f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(*numbers)] if numbers else []
    return ", ".join([*["embeddings"] * ((0, 0) in places), *named, *["above"] * ((2, 0) in places)])
