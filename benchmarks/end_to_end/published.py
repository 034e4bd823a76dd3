"""The published way of ranking tensors, restated: batch 1, every per-sample gradient kept, scored from what was kept.

Written from equations (1) to (3) of docs/method.md and, for the compression, from the description of OPORP (arXiv
2302.03505) in the pipelines that use it: rounds of row and column permutations, random signs, sums over bins.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fillm.data import Sample, SampleSet

Kept = dict[str, list[Tensor]]  # per tensor, one flat vector a sample
Compress = Callable[[str, Tensor], Tensor]


@contextmanager
def trainable(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """All parameters require a gradient, as in training; afterwards as before, and without `.grad`."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield list(model.named_parameters())
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def sample_gradient(model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]], sample: Sample) -> list[Tensor]:
    """Autograd of one sample's mean negative log-likelihood over its counted tokens; zeros where none arrives.

    Returns:
        One tensor a parameter, of its shape and dtype, in nats per unit of weight.
    """
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor(sample.labels)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    loss = nn.functional.cross_entropy(logits[:-1], labels[1:])
    return list(torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True, materialize_grads=True))


def kept_gradients(model: nn.Module, samples: SampleSet, compress: Compress | None = None) -> Kept:
    """The gradient of every sample with respect to every tensor, flat and compressed on request, all in memory."""
    with trainable(model) as parameters:
        kept: Kept = {name: [] for name, _ in parameters}
        for sample in samples:
            for (name, _), gradient in zip(parameters, sample_gradient(model, parameters, sample), strict=True):
                vector = gradient.reshape(-1)
                kept[name].append(vector if compress is None else compress(name, vector))
    return kept


def scores_from_kept(
    forget: Kept, retain: Kept, damping: float, dimension: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Equations (1), (2) in its first form, and (3), tensor by tensor.

    Args:
        forget: what `kept_gradients` gave for the forget set.
        retain: the same for the retain set.
        damping: the factor in (1).
        dimension: what (1) divides by; None is the length of the vectors, which for sketches is the published choice.

    Returns:
        `|u|` of every tensor: 0 where neither set has a gradient, infinite where only the forget set has one.
    """
    scores = {}
    for name, gradients in retain.items():
        v = torch.stack(forget[name]).mean(0)
        squares = [float(g.dot(g)) for g in gradients]
        size = v.numel() if dimension is None else dimension[name]
        lambda_ = damping * sum(squares) / len(squares) / size
        if lambda_ == 0.0:
            scores[name] = math.inf if bool(v.any()) else 0.0
            continue
        u = torch.zeros_like(v)
        for g, square in zip(gradients, squares, strict=True):
            u -= v - g * (float(g.dot(v)) / (lambda_ + square))
        scores[name] = float(u.norm()) / (len(gradients) * lambda_)
    return scores


def published_scores(
    model: nn.Module, forget: SampleSet, retain: SampleSet, damping: float, compress: Compress | None = None
) -> dict[str, float]:
    """The whole pipeline: gradients of both sets, then scores.

    Args:
        model: a causal language model in eval mode; left as it was.
        forget: samples to forget, one forward and backward each.
        retain: samples to keep, likewise.
        damping: the factor in (1).
        compress: applied to every gradient before it is kept; the damping is then divided by the compressed length.

    Returns:
        `|u|` of every tensor.
    """
    kept = [kept_gradients(model, samples, compress) for samples in (forget, retain)]
    return scores_from_kept(kept[0], kept[1], damping)


class Oporp:
    """One sketch of one length: shuffle, random signs, sums over bins of equal length; it keeps its own tables.

    A round looks at the vector as a matrix of random height and permutes its rows, then looks at it as another and
    permutes its columns: two moves of every entry. The vector is padded with zeros to a multiple of `k`.

    Args:
        numel: length of the vectors.
        k: length of a sketch.
        rounds: of shuffling.
        seed: of all tables.
    """

    def __init__(self, numel: int, k: int, rounds: int, seed: int) -> None:
        self.k, self._padding = k, -numel % k
        size = numel + self._padding
        self._heights, self._permutations = [], []
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        # Neither side of a view is shorter than the fourth root, so that no permutation is nearly none.
        sides = [d for d in divisors(size) if d**4 >= size and (size // d) ** 4 >= size] or [size]
        for _ in range(2 * rounds):
            self._heights.append(draw.choice(sides))
            self._permutations.append(torch.randperm(self._heights[-1], generator=generator))
        self._signs = torch.randint(2, [size], generator=generator).mul_(2).sub_(1).float()

    def __call__(self, vector: Tensor) -> Tensor:
        """[P] float32 or float64 -> [k], same dtype; `E<Sx, Sy> = <x, y>`."""
        vector = nn.functional.pad(vector, (0, self._padding)) if self._padding else vector
        for move, (side, permutation) in enumerate(zip(self._heights, self._permutations, strict=True)):
            columns = move % 2
            view = vector.reshape(-1, side) if columns else vector.reshape(side, -1)
            vector = view.index_select(columns, permutation)
        return (vector.reshape(-1) * self._signs).reshape(self.k, -1).sum(1)


class OporpPerTensor:
    """A sketch for every tensor, made at its first gradient."""

    def __init__(self, k: int, rounds: int, seed: int = 0) -> None:
        self._k, self._rounds, self._seed = k, rounds, seed
        self._sketches: dict[str, Oporp] = {}

    def __call__(self, name: str, vector: Tensor) -> Tensor:
        """The sketch of one gradient of tensor `name`, [P] -> [k]."""
        if name not in self._sketches:
            seed = self._seed + len(self._sketches)
            self._sketches[name] = Oporp(vector.numel(), self._k, self._rounds, seed)
        return self._sketches[name](vector)


def divisors(number: int) -> list[int]:
    """All divisors, in rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
