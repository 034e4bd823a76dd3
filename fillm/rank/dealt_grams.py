"""Exact Gram matrices in several processes: each keeps the gradients of its own batches, and computes some tensors.

The processes take tensors in turn, as many at a time as there are processes. What all keep of a tensor goes to the one
whose turn it is, in the order in which one process would have kept it, so that the matrices have the same bits. They
then go to all.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fillm.capture import Capture
from fillm.capture.packing import pack, packed_bytes, unpack
from fillm.data import SampleSet
from fillm.rank.passes import Passes
from fillm.runs.processes import Processes
from fillm.statistics import KeptGradients, TensorGram, tensor_gram
from fillm.statistics.exact_gram import Kept


def grams_of(
    passes: Passes,
    capture: Capture,
    names: Sequence[str],
    kept: Mapping[str, KeptGradients],
    sets: Mapping[str, SampleSet],
) -> Iterator[TensorGram]:
    """The Gram matrices of some tensors from what passes have kept, in every process; what was kept is forgotten.

    Args:
        passes: whose processes take part.
        capture: that was run; all the same in all processes, but for what they keep.
        names: of the tensors.
        kept: of the forget and the retain set, of this process's batches.
        sets: both sets, by the same names.
    """
    processes, sizes = passes.processes, [len(samples) for samples in sets.values()]
    shapes = {name: capture.parameters[name].shape for name in names}
    if processes.count == 1:
        for name in names:
            yield tensor_gram(name, shapes[name], *(kept[which].take(name) for which in sets), *sizes)
        return
    places = {which: _places(passes, samples) for which, samples in sets.items()}
    for first in range(0, len(names), processes.count):
        turn = names[first : first + processes.count]
        own, error = None, None
        try:
            for receiver, name in enumerate(turn):
                both = [_gathered(processes, kept[which].take(name), places[which], receiver) for which in sets]
                if receiver == processes.index:
                    own = name, both
        except Exception as caught:  # the others are in the midst of it
            processes.abandon(caught)
        try:
            gram = None if own is None else tensor_gram(own[0], shapes[own[0]], *own[1], *sizes)
        except Exception as caught:  # raised where the processes meet
            gram, error = None, caught
        processes.meet(error=error)
        for sender, name in enumerate(turn):
            yield spread(
                processes, gram if sender == processes.index else None, name, shapes[name].numel(), sizes, sender
            )


def spread(
    processes: Processes, gram: TensorGram | None, name: str, numel: int, sizes: Sequence[int], sender: int
) -> TensorGram:
    """What one process has computed, in all of them.

    Args:
        processes: of the run.
        gram: of the sender; None in the others.
        name: of the tensor.
        numel: its entries.
        sizes: samples of the forget and of the retain set, `m` and `n`.
        sender: which process has it.
    """
    m, n = sizes
    shapes = {"forget": (m, m), "cross": (n, m), "retain": (n, n)}
    if numel <= n:
        shapes |= {"retain_rows": (n, numel), "forget_rows": (m, numel)}
    parts: dict[str, Tensor] = {}
    for part, shape in shapes.items():
        values = torch.empty(shape, dtype=torch.float64) if gram is None else getattr(gram, part).contiguous()
        processes.spread(values, sender)
        parts[part] = values
    return TensorGram(name, numel, **parts)


def _places(passes: Passes, samples: SampleSet) -> list[int]:
    """By position, the number of the batch that holds a sample."""
    out = [0] * len(samples)
    for number, members in enumerate(passes.batches(samples)):
        for position in members:
            out[position] = number
    return out


def _gathered(processes: Processes, own: Kept, places: Sequence[int], receiver: int) -> Kept:
    """What all processes have kept of a tensor, in the order of the batches, in the one that is to receive it."""
    described, data = pack(own, processes.device)
    heard = processes.tell(described)
    found = list(own)
    for sender, text in enumerate(heard):
        if sender == receiver or not packed_bytes(text):
            continue
        if processes.index == receiver:
            data = torch.empty(packed_bytes(text), dtype=torch.uint8, device=processes.device)
        processes.hand(data, sender, receiver)
        if processes.index == receiver:
            found += unpack(text, data)
    return sorted(found, key=lambda one: places[int(one[1][0])]) if processes.index == receiver else []
