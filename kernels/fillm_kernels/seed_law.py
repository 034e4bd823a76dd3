"""The seed law: bins, signs and Gaussian entries of every sketch, from a counter-based hash; docs/seed-law.md.

No table is stored. The same functions exist in C++ and CUDA C++ (csrc/cpu/seed_law.h) and for Triton
(triton/seed_law.py); golden vectors in the tests hold all of them to the same bits. Everything is arithmetic modulo
2^32; 64-bit indices enter as two words. The functions take Python integers or int64 tensors of any shape that hold
words in [0, 2^32).
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fillm_kernels.errors import ShapeError

Word = TypeVar("Word", int, Tensor)

MASK = 0xFFFFFFFF
# Two odd multipliers of full avalanche: the constants of the public-domain finaliser lowbias32 (C. Wellons, 2018).
FIRST, SECOND = 0x7FEB352D, 0x846CA68B
KEY_A, KEY_B = 0x243F6A88, 0x85A308D3  # the first 64 bits of the fraction of pi

KINDS = ("oporp", "countsketch", "sjlt", "rademacher", "gaussian", "tensorsketch")
START, SIGN, RADIUS, ANGLE = range(4)  # streams: independent words for one and the same index
SIGNS = 32  # sign bits of a word; for the block-wise maps, of 32 consecutive blocks
LARGEST_DIM = 1 << 30
MOST_CHUNKS = 1 << 24  # the number of a chunk is the upper 24 bits of a tag of one word
RANGES, NARROWEST = 4, 64  # runs of bins of a countsketch, and bins a run has at least


def mix(word: Word) -> Word:
    """A bijection of 32-bit words in which every input bit flips every output bit half of the time."""
    word = ((word ^ (word >> 16)) * FIRST) & MASK
    word = ((word ^ (word >> 15)) * SECOND) & MASK
    return word ^ (word >> 16)


def keys(seed: int, kind: str, stream: int, chunk: int = 0) -> tuple[int, int]:
    """The two key words of one stream of a kind of sketch.

    Args:
        seed: in [0, 2^63).
        kind: one of `KINDS`.
        stream: START, SIGN, RADIUS or ANGLE.
        chunk: which of the independent maps of an SJLT, or which side of a two-sided sketch.
    """
    low, high = seed & MASK, seed >> 32
    tag = KINDS.index(kind) | stream << 4 | chunk << 8
    first, second = (mix(mix(mix(low ^ constant) + high & MASK) ^ tag) for constant in (KEY_A, KEY_B))
    return first, second


def cell(key: tuple[int, int], index: Word, column: Word) -> Word:
    """The word of a (64-bit index, 32-bit column) pair under a key: what everything else is made of.

    Args:
        key: from `keys`.
        index: in [0, 2^63).
        column: in [0, 2^32); shapes broadcast.

    Returns:
        Words, uniform on [0, 2^32).
    """
    low, high = index & MASK, index >> 32
    first = mix(mix(low ^ key[0]) + high & MASK)
    second = mix(mix(low ^ key[1]) + high & MASK)
    return mix(mix(column + first & MASK) ^ second)


def below(word: Word, limit: int) -> Word:
    """A uniform word turned into one of 0 .. limit - 1; no value is likelier than 1 / limit + 2^-32."""
    return (word * limit) >> 32


def negative(key: tuple[int, int], index: Word, column: Word) -> Word:
    """Sign bit (1: negative) of an (index, column) pair: bit `index mod 32` of the word of (index div 32, column)."""
    return (cell(key, index >> 5, column) >> (index & 31)) & 1


def normal(seed: int, kind: str, index: Tensor, column: Tensor) -> Tensor:
    """Standard normal entries by Box-Muller, a pair for every two columns.

    Args:
        seed: in [0, 2^63).
        kind: one of `KINDS`.
        index: coordinates, int64.
        column: row of the projection, int64; shapes broadcast.

    Returns:
        float64 entries; backends in float32 agree within rounding.
    """
    radius = cell(keys(seed, kind, RADIUS), index, column >> 1)
    angle = cell(keys(seed, kind, ANGLE), index, column >> 1)
    # 23 and 24 bits, so that both numbers are exact in float32 and neither logarithm nor radius is infinite.
    length = (-2 * (((radius >> 9).double() + 0.5) * 2.0**-23).log()).sqrt()
    turn = (angle >> 8).double() * (2.0**-24 * 2 * math.pi)
    return length * torch.where((column & 1) == 0, turn.cos(), turn.sin())


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor of a model: (seed, name) hashed to [0, 2^63).

    Args:
        seed: the run's seed, in [0, 2^63).
        name: the tensor's name; its UTF-8 bytes are taken four at a time, the last word padded with zeros, then their
            number.
    """
    data = name.encode()
    words = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)] + [len(data)]
    low, high = mix((seed & MASK) ^ KEY_A), mix((seed >> 32) ^ KEY_B)
    for word in words:
        low, high = mix(low ^ word) + high & MASK, mix(high + word & MASK) ^ low
    return mix(low) | (mix(high) >> 1) << 32


@dataclass(frozen=True)
class BlockMap:
    """A block-wise sparse map: which bins and signs a run of `width` consecutive coordinates gets.

    The `dim` bins are `chunks` equal parts, every one fed by an independent map of all coordinates, and every part is
    `ranges` equal runs of `width` bins. Block b (coordinates b width .. (b + 1) width - 1) gets one uniformly random
    bin `start` of a part: its coordinates fill the run around `start`, rotated so that the first falls on `start`.

    Attributes:
        kind: oporp, countsketch or sjlt.
        seed: in [0, 2^63).
        chunks: independent maps, 1 but for sjlt.
        ranges: runs of bins in a chunk, 1 but for countsketch.
        width: bins of a run and coordinates of a block; dim = chunks * ranges * width.
    """

    kind: str
    seed: int
    chunks: int
    ranges: int
    width: int

    @classmethod
    def of(cls, kind: str, seed: int, dim: int, nonzeros: int) -> "BlockMap":
        """The map of a kind at a dimension.

        Raises:
            ShapeError: if `nonzeros` does not divide `dim` or is larger than 2^24.
        """
        if kind != "sjlt":
            fits = [1, *(r for r in (2, RANGES) if dim % r == 0 and dim // r >= NARROWEST)]
            ranges = fits[-1] if kind == "countsketch" else 1
            return cls(kind, seed, 1, ranges, dim // ranges)
        if nonzeros < 1 or dim % nonzeros:
            raise ShapeError(f"sjlt: dim = {dim} must be a multiple of nonzeros = {nonzeros}")
        if nonzeros > MOST_CHUNKS:
            raise ShapeError(f"sjlt: nonzeros must be at most 2^24; got {nonzeros}")
        return cls(kind, seed, nonzeros, 1, dim // nonzeros)

    @property
    def chunk_dim(self) -> int:
        """Bins of one chunk."""
        return self.ranges * self.width

    @property
    def scale(self) -> float:
        """What every nonzero of the map is multiplied by."""
        return 1 / math.sqrt(self.chunks)

    def starts(self, block: Word, chunk: int) -> Word:
        """Bin of the chunk that block's first coordinate falls on; block in [0, 2^63)."""
        return below(cell(keys(self.seed, self.kind, START, chunk), block, 0), self.chunk_dim)

    def signs(self, block: Word, bins: Word, chunk: int) -> Word:
        """1 where the coordinate of `block` that falls on bin `bins` of the chunk is subtracted, else 0."""
        return negative(keys(self.seed, self.kind, SIGN, chunk), block, bins)

    def place(self, coordinate: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Bin in [0, dim) and sign bit of flat coordinates, int64, in one chunk: the whole map, and its definition."""
        block, position = coordinate // self.width, coordinate % self.width
        start = self.starts(block, chunk)
        first = start // self.width * self.width
        bins = first + (start - first + position) % self.width
        return chunk * self.chunk_dim + bins, self.signs(block, bins, chunk)
