"""The seed law as docs/seed-law.md has it, written a second time, with numpy words; shares no code with the library."""

import numpy as np
import torch
from torch import Tensor

KINDS = {"oporp": 0, "countsketch": 1, "sjlt": 2, "rademacher": 3, "gaussian": 4, "tensorsketch": 5}
START, SIGN, RADIUS, ANGLE = 0, 1, 2, 3
WORD = np.uint64(0xFFFFFFFF)


def u64(value: object) -> np.ndarray:
    return np.asarray(value, dtype=np.uint64)


def mix(word: object) -> np.ndarray:
    word = u64(word)
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        word = (word ^ (word >> u64(shift))) * u64(multiplier) & WORD
    return word ^ (word >> u64(16))


def keys(seed: int, kind: str, stream: int, chunk: int = 0) -> list[np.ndarray]:
    tag = u64(KINDS[kind] | stream << 4 | chunk << 8)
    low, high = u64(seed & 0xFFFFFFFF), u64(seed >> 32)
    return [mix(mix((mix(low ^ u64(c)) + high) & WORD) ^ tag) for c in (0x243F6A88, 0x85A308D3)]


def cell(key: list[np.ndarray], index: np.ndarray, column: np.ndarray) -> np.ndarray:
    one, other = (mix((mix((index & WORD) ^ k) + (index >> u64(32))) & WORD) for k in key)
    return mix(mix((column + one) & WORD) ^ other)


def negative(key: list[np.ndarray], index: np.ndarray, column: np.ndarray) -> np.ndarray:
    return (cell(key, index >> u64(5), column) >> (index & u64(31))) & u64(1)


def block_map(kind: str, seed: int, dim: int, nonzeros: int, index: np.ndarray) -> np.ndarray:
    chunks = nonzeros if kind == "sjlt" else 1
    ranges = 1
    if kind == "countsketch":
        ranges = next(r for r in (4, 2, 1) if r == 1 or (dim % r == 0 and dim // r >= 64))
    part, width = dim // chunks, dim // chunks // ranges
    matrix = np.zeros((len(index), dim))
    for chunk in range(chunks):
        block, place = index // u64(width), index % u64(width)
        start = cell(keys(seed, kind, START, chunk), block, u64(0)) * u64(part) >> u64(32)
        first = start - start % u64(width)
        bins = first + (start - first + place) % u64(width)
        signs = 1.0 - 2.0 * negative(keys(seed, kind, SIGN, chunk), block, bins).astype(float)
        matrix[np.arange(len(index)), chunk * part + bins.astype(int)] = signs
    return matrix / np.sqrt(chunks)


def projection(kind: str, seed: int, dim: int, count: int, *, offset: int = 0, nonzeros: int = 4) -> Tensor:
    """The matrix of a sketch, [count, dim], float64: row q is what coordinate `offset + q` contributes."""
    index, column = u64(np.arange(count)) + u64(offset), u64(np.arange(dim))
    if kind == "rademacher":
        matrix = 1.0 - 2.0 * negative(keys(seed, kind, SIGN), index[:, None], column).astype(float)
        return torch.from_numpy(matrix / np.sqrt(dim))
    if kind == "gaussian":
        radius, angle = (cell(keys(seed, kind, s), index[:, None], column >> u64(1)) for s in (RADIUS, ANGLE))
        length = np.sqrt(-2 * np.log(((radius >> u64(9)).astype(float) + 0.5) / 2**23))
        turn = 2 * np.pi * (angle >> u64(8)).astype(float) / 2**24
        matrix = length * np.where(column % u64(2) == 0, np.cos(turn), np.sin(turn))
        return torch.from_numpy(matrix / np.sqrt(dim))
    if kind == "tensorsketch":
        raise ValueError("a TensorSketch has no matrix of its own; see tensorsketch")
    return torch.from_numpy(block_map(kind, seed, dim, nonzeros, index))


def tensor_seed(seed: int, name: str) -> int:
    a, b = mix(u64(seed & 0xFFFFFFFF) ^ u64(0x243F6A88)), mix(u64(seed >> 32) ^ u64(0x85A308D3))
    data = name.encode()
    padded = data + bytes(-len(data) % 4)
    for word in [*np.frombuffer(padded, dtype="<u4").tolist(), len(data)]:
        a, b = (mix(a ^ u64(word)) + b) & WORD, mix((b + u64(word)) & WORD) ^ a
    return int(mix(a)) | (int(mix(b)) >> 1) << 32


def two_sided(kind: str, seed: int, dims: tuple[int, ...], gradients: Tensor) -> Tensor:
    """`factored_sketch` of gradients [B, O, I] formed outright, float64."""
    _, outputs, inputs = gradients.shape
    if kind == "tensorsketch":
        return tensorsketch(seed, dims[0], gradients)
    side = {"factored": "gaussian", "factored-sjlt": "sjlt"}[kind]
    nonzeros = [next(n for n in (4, 2, 1) if k % n == 0) for k in dims]
    left = projection(side, tensor_seed(seed, "out"), dims[0], outputs, nonzeros=nonzeros[0])
    right = projection(side, tensor_seed(seed, "in"), dims[1], inputs, nonzeros=nonzeros[1])
    return torch.einsum("ok,boi,il->bkl", left, gradients.double(), right).flatten(1)


def tensorsketch(seed: int, dim: int, gradients: Tensor) -> Tensor:
    """Entry (o, i) goes to bin (h(o) + h'(i)) mod dim with the product of two signs."""
    samples, outputs, inputs = gradients.shape
    bins, signs = [], []
    for chunk, width in enumerate((outputs, inputs)):
        index = u64(np.arange(width))
        bins.append(cell(keys(seed, "tensorsketch", START, chunk), index, u64(0)) * u64(dim) >> u64(32))
        signs.append(1.0 - 2.0 * negative(keys(seed, "tensorsketch", SIGN, chunk), index, u64(0)).astype(float))
    place = torch.from_numpy(((bins[0][:, None] + bins[1]) % u64(dim)).astype(np.int64)).flatten()
    signed = gradients.double() * torch.from_numpy(signs[0][:, None] * signs[1])
    result = torch.zeros(samples, dim, dtype=torch.float64)
    return result.index_add_(1, place, signed.flatten(1))
