"""An element mask for a model of a given shape, from simulated scores: seconds, bytes on disk, peak memory.

python -m benchmarks.masks [--shape 8b|tiny] [--fraction F] [--verify] [--csv FILE]

Scores are drawn anew, piece by piece, at each of the three reads; the time of drawing them is stated beside. With
--verify, what was saved is loaded again: the number of bits has to be right, and no score that is left out larger than
one that is chosen. The peak is that of before, without the pages of the file.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from fillm_kernels.top_mask import unpack_bits
from torch import Tensor

from benchmarks.kernels.rows import save
from fillm.masks import PIECE, Mask, ScoredTensor, element_masks, make_choice

# layers, hidden, intermediate, key and value rows, vocabulary; 8b as Llama-3-8B (arXiv 2407.21783, Table 3)
SHAPES = {"8b": (32, 4096, 14336, 1024, 128256), "tiny": (2, 64, 224, 16, 1000)}


def tensors_of(shape: str) -> list[ScoredTensor]:
    """All tensors of an untied Llama, in the order of their names."""
    layers, hidden, inner, shared, vocabulary = SHAPES[shape]
    found = [
        ScoredTensor("lm_head.weight", "lm_head", (vocabulary, hidden)),
        ScoredTensor("model.embed_tokens.weight", "embed", (vocabulary, hidden)),
        ScoredTensor("model.norm.weight", "norm", (hidden,)),
    ]
    rows = {"q_proj": hidden, "k_proj": shared, "v_proj": shared, "o_proj": hidden}
    for layer in (f"model.layers.{number}" for number in range(layers)):
        found += [ScoredTensor(f"{layer}.self_attn.{name}.weight", "attn", (n, hidden)) for name, n in rows.items()]
        found += [
            ScoredTensor(f"{layer}.mlp.{name}.weight", "mlp", (inner, hidden)) for name in ("gate_proj", "up_proj")
        ]
        found.append(ScoredTensor(f"{layer}.mlp.down_proj.weight", "mlp", (hidden, inner)))
        norms = ("input_layernorm", "post_attention_layernorm")
        found += [ScoredTensor(f"{layer}.{name}.weight", "norm", (hidden,)) for name in norms]
    return sorted(found, key=lambda tensor: tensor.name)


class SimulatedScores:
    """Sizes of normal numbers, a spread of its own for every tensor; the same at every read."""

    dtype, ascending, unused = torch.float32, False, 0.0

    def __init__(self, tensors: Sequence[ScoredTensor]) -> None:
        self._numbers = {tensor.name: (number, tensor.numel) for number, tensor in enumerate(tensors)}

    def pieces(self, name: str) -> Iterator[Tensor]:
        number, numel = self._numbers[name]
        for begin in range(0, numel, PIECE):
            generator = torch.Generator().manual_seed(number << 20 | begin // PIECE)
            piece = torch.empty(min(PIECE, numel - begin)).normal_(generator=generator)
            yield piece.abs_().mul_(1.0 + 0.1 * (number % 7))


def bounds(mask: Mask, tensors: Sequence[ScoredTensor], scores: SimulatedScores) -> tuple[float, float]:
    """The smallest score that is chosen, and the largest that is not."""
    lowest, highest = float("inf"), float("-inf")
    for tensor in tensors:
        none = torch.zeros(-(-tensor.numel // 8), dtype=torch.uint8)
        packed = mask[tensor.name].packed() if tensor.name in mask else none
        for bits, piece in zip(packed.split(PIECE // 8), scores.pieces(tensor.name), strict=True):
            chosen = unpack_bits(bits, len(piece))
            lowest = min(lowest, float(piece[chosen].min())) if chosen.any() else lowest
            highest = max(highest, float(piece[~chosen].max())) if not chosen.all() else highest
    return lowest, highest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.masks", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    tensors = tensors_of(options.shape)
    scores, weights = SimulatedScores(tensors), sum(tensor.numel for tensor in tensors)
    begun = time.perf_counter()
    for tensor in tensors:
        for _ in scores.pieces(tensor.name):
            pass
    drawn = time.perf_counter() - begun
    begun = time.perf_counter()
    mask = Mask(element_masks(make_choice(options.fraction), tensors, scores), {"method": "simulated"})
    chosen = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        begun = time.perf_counter()
        mask.save(path)
        saved = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
        count, size = mask.count, path.stat().st_size
        lowest, highest = float("inf"), float("-inf")
        if options.verify:
            del mask
            loaded = Mask.load(path)
            count = loaded.count
            lowest, highest = bounds(loaded, tensors, scores)
    row = {
        "shape": options.shape,
        "weights": weights,
        "fraction": options.fraction,
        "selected": count,
        "threads": torch.get_num_threads(),
        "seconds to draw the scores once": f"{drawn:.1f}",
        "seconds to choose, three reads": f"{chosen:.1f}",
        "seconds to save": f"{saved:.1f}",
        "bytes on disk": size,
        "bits a weight": f"{8 * size / weights:.4f}",
        "peak resident bytes": peak,
    }
    if options.verify:
        row |= {"smallest chosen score": lowest, "largest score left": highest}
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    save(options.csv, [row])
    if lowest < highest or count != int(options.fraction * weights):
        raise SystemExit("the mask is wrong")


if __name__ == "__main__":
    main()
