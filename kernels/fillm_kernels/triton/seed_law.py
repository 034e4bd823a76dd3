"""The seed law (docs/seed-law.md) for Triton kernels: the same bits as `fillm_kernels.seed_law`.

Words are uint32. A seed enters a kernel as two signed 32-bit halves (`halves`), so that its value changes no type.
"""

import triton
import triton.language as tl

START, SIGN, RADIUS, ANGLE = (tl.constexpr(stream) for stream in range(4))


def halves(seed: int) -> tuple[int, int]:
    """Low and high 32 bits of a seed, each as a signed integer."""
    return tuple(word - (word >> 31 << 32) for word in (seed & 0xFFFFFFFF, seed >> 32))


@triton.jit
def mix(word):
    """A bijection of 32-bit words, uint32 of any shape."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def key_of(seed_low, seed_high, KIND: tl.constexpr, STREAM: tl.constexpr, chunk):
    """The two key words of a stream: seed halves int32, KIND its number in KINDS, chunk an int32 or a constant."""
    low = seed_low.to(tl.uint32, bitcast=True)
    high = seed_high.to(tl.uint32, bitcast=True)
    tag = (tl.cast(chunk, tl.int32) * 256 + (KIND + STREAM * 16)).to(tl.uint32)
    return mix(mix(mix(low ^ 0x243F6A88) + high) ^ tag), mix(mix(mix(low ^ 0x85A308D3) + high) ^ tag)


@triton.jit
def state_of(first, second, index):
    """The half of the hash that depends on the int64 index alone: two words of index's shape."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return mix(mix(low ^ first) + high), mix(mix(low ^ second) + high)


@triton.jit
def cell(first, second, column):
    """The word of (index, column) from the index's state; column uint32, shapes broadcast."""
    return mix(mix(column + first) ^ second)


@triton.jit
def below(word, limit):
    """Uniform words turned into 0 .. limit - 1, int32."""
    return ((word.to(tl.uint64) * limit) >> 32).to(tl.int32)


@triton.jit
def place(coordinate, seed_low, seed_high, width, ranges, KIND: tl.constexpr, chunk):
    """Bin within the chunk (int32) and sign bit (uint32) of flat coordinates: `BlockMap.place` for a tile in registers.

    A fused kernel that holds rows o and columns i of a gradient [O, I] passes o I + i, int64, of any shape. Entries of
    one row closer together than `width` never share a bin; those of different rows may.
    """
    block = coordinate // width
    position = (coordinate - block * width).to(tl.int32)
    first, second = key_of(seed_low, seed_high, KIND, START, chunk)
    first, second = state_of(first, second, block)
    start = below(cell(first, second, tl.zeros_like(first)), width * ranges)
    low = start // width * width
    bins = start + position
    bins = tl.where(bins >= low + width, bins - width, bins)
    first, second = key_of(seed_low, seed_high, KIND, SIGN, chunk)
    first, second = state_of(first, second, block >> 5)
    word = cell(first, second, bins.to(tl.uint32))
    return bins, (word >> (block & 31).to(tl.uint32)) & 1


@triton.jit
def cosine(turn, odd):
    """Cosine (sine where odd is 1) of turn / 2^24 of a full turn, turn uint32 below 2^24.

    Reduced exactly, in integers, to the nearest quarter: a library's function reserves stack for arguments of any size.
    """
    turn = turn.to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    angle = (turn - (quarter << 22)).to(tl.float32) * 3.7450702829238413e-07  # within pi / 4
    square = angle * angle
    # Taylor series; the first terms left out are below 2e-9 and 3e-8.
    sine = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    even = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    quarter = (quarter + 3 * odd) & 3
    value = tl.where((quarter & 1) == 1, sine, even)
    return tl.where(((quarter + 1) >> 1 & 1) == 1, -value, value)


@triton.jit
def normal(coordinate, column, seed_low, seed_high, KIND: tl.constexpr):
    """Standard normal entries of coordinates [K], int64, and columns [C], int32 -> [K, C], float32."""
    pair = (column >> 1).to(tl.uint32)[None, :]
    first, second = key_of(seed_low, seed_high, KIND, RADIUS, 0)
    first, second = state_of(first, second, coordinate)
    # 23 bits, and 24 below: both exact in float32.
    radius = ((cell(first[:, None], second[:, None], pair) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    first, second = key_of(seed_low, seed_high, KIND, ANGLE, 0)
    first, second = state_of(first, second, coordinate)
    turned = cosine(cell(first[:, None], second[:, None], pair) >> 8, (column & 1)[None, :])
    return tl.sqrt(-2.0 * tl.log(radius)) * turned
