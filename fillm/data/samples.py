"""Token samples: what a model is given, what of it counts, and which sets of them are the same."""

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from fillm.errors import UsageError

IGNORED = -100  # the label that cross entropy skips, as in torch and transformers


@dataclass(frozen=True)
class Sample:
    """One tokenised row.

    Attributes:
        id: stable name, such as `tofu:full#3961`.
        input_ids: [T] token ids.
        labels: [T], the token id where it counts in the loss, -100 elsewhere. Not shifted: the model predicts
            `labels[t]` from the tokens before `t`, so `labels[0]` is always -100.
    """

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_counted(self) -> int:
        """Number of tokens whose label counts."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class SampleSet(Sequence[Sample]):
    """Samples in the order of their data set.

    Attributes:
        samples: the samples.
        source: the spec they came from, for messages and records.
        skipped: (where, why) of every row that `skip_bad_rows` left out.
        shortened: ids of samples that lost tokens of their answer (not only of their prompt) to `max_length`.
    """

    samples: Sequence[Sample]
    source: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "SampleSet": ...

    def __getitem__(self, index: int | slice) -> "Sample | SampleSet":
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def subset(self, positions: Sequence[int]) -> "SampleSet":
        """The samples at `positions`, in that order; what was skipped stays on record."""
        samples = [self.samples[position] for position in positions]
        ids = {sample.id for sample in samples}
        return SampleSet(samples, self.source, list(self.skipped), [name for name in self.shortened if name in ids])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [sample.num_tokens for sample in self.samples]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return sum(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the token ids and labels of all samples, in order; their names do not matter."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(sample.num_tokens.to_bytes(8, "little"))
            digest.update(_int64_bytes(sample.input_ids))
            digest.update(_int64_bytes(sample.labels))
        return digest.hexdigest()


def _int64_bytes(values: Sequence[int]) -> bytes:
    """Little-endian int64, so that a fingerprint is the same on every machine."""
    numbers = array("q", values)
    if _BIG_ENDIAN:
        numbers.byteswap()
    return numbers.tobytes()


_BIG_ENDIAN = array("q", [1]).tobytes()[0] == 0


def take(sample_set: SampleSet, count: int | None, seed: int, option: str = "count") -> SampleSet:
    """A seeded random subset of `count` samples, in their original order.

    With the same seed a smaller subset is part of a larger one, so that a study over `count` adds samples rather
    than exchanging them. The draw uses `random.Random(seed).random()`, which is stable over Python versions.

    Args:
        sample_set: the samples to choose from.
        count: how many; None keeps all.
        seed: of the draw.
        option: the flag that `count` came from, for the message.

    Raises:
        UsageError: if `count` is below 1 or above the number of samples.
    """
    if count is None:
        return sample_set
    if not 1 <= count <= len(sample_set):
        available = f"{sample_set.source} has {len(sample_set)} samples"
        raise UsageError(f"{option} {count}: {available}; give 1 to {len(sample_set)}, or leave it out for all")
    draw = random.Random(seed)
    keys = [draw.random() for _ in range(len(sample_set))]
    chosen = sorted(range(len(sample_set)), key=keys.__getitem__)[:count]
    return sample_set.subset(sorted(chosen))


def shared_rows(a: SampleSet, b: SampleSet) -> list[tuple[str, str]]:
    """Samples of `a` that stand in `b` too, with the same tokens and labels.

    Returns:
        (id in `a`, id of the first equal sample in `b`) in the order of `a`.
    """
    in_b: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for sample in b:
        in_b.setdefault((sample.input_ids, sample.labels), sample.id)
    pairs = ((sample.id, in_b.get((sample.input_ids, sample.labels))) for sample in a)
    return [(left, right) for left, right in pairs if right is not None]
