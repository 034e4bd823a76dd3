"""Rankings of random models, and a masked step, beside plain forward + backward: for `python -m benchmarks.gpu`."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.end_to_end.sketched import rank_sketched
from benchmarks.end_to_end.variants import batch_losses, forward_backward
from benchmarks.kernels.gpu_timing import Clock, ceilings
from benchmarks.masked_training import some_rows
from fillm import MaskedOptimizer, frozen_outside
from fillm.capture import Capture, verify
from fillm.data import Sample, SampleSet
from fillm.models import catalogue
from fillm.rank.config import RankConfig
from fillm.rank.console import Console
from fillm.rank.costs import Costs, batch_shapes
from fillm.rank.passes import Passes
from fillm.rank.plan_passes import MethodPass, passes_of, planned_flop
from fillm.rank.soir import rank_soir

TOKENS_PER_BATCH = 8192
SKETCH, SKETCH_DIM = "factored-sjlt", 512  # two halves of 16 x 16
MASK_SHARE = 0.1  # of the rows of every matrix
# TOFU's rows: 28, 62 and 112 tokens at the least, in the middle and at the most.
LENGTHS = (28, 44, 56, 62, 70, 84, 112)
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A published model's shape.

    Attributes:
        name: of the model.
        hidden, intermediate, layers, heads, key_value_heads, vocabulary, tied: of its config; heads of 64 or 128.
        dtypes: element types to rank it in.
        rounds: timed ones, after one of warm-up.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    tied: bool
    dtypes: tuple[torch.dtype, ...]
    rounds: int
    vocabulary: int = 128256

    def config(self, shrink: int) -> LlamaConfig:
        """Its widths and depth divided by `shrink`."""
        hidden = max(64, self.hidden // shrink)
        head = min(hidden, self.hidden // self.heads)
        heads = hidden // head
        return LlamaConfig(
            hidden_size=hidden, intermediate_size=self.intermediate * hidden // self.hidden,
            num_hidden_layers=max(2, self.layers // shrink), num_attention_heads=heads,
            num_key_value_heads=max(1, heads * self.key_value_heads // self.heads), head_dim=head,
            vocab_size=max(256, self.vocabulary // shrink), tie_word_embeddings=self.tied,
            max_position_embeddings=2048,
        )  # fmt: skip

    def parameters(self, shrink: int) -> int:
        """How many there are, without the memory for them."""
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config(shrink))
        return sum(p.numel() for p in model.parameters())


SHAPES = (
    Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, True, (torch.bfloat16,), 3),
    Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, False, (torch.bfloat16,), 1),
    Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, True, (torch.float32,), 2),  # the slowest comes last
)
# Two float32 accumulators a parameter (README.md, limits); logits of one batch of plain backward in three copies.
ACCUMULATED, BATCH_BYTES = 8, 16 << 30
LEAST_SECONDS = 40.0  # a ranking that would have less is not begun


def random_samples(count: int, vocabulary: int, seed: int) -> SampleSet:
    """Rows of TOFU's lengths; the second half of each counts."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        length = LENGTHS[i % len(LENGTHS)]
        ids = tuple(torch.randint(vocabulary, (length,), generator=draw).tolist())
        labels = tuple(-100 if t < length // 2 else token for t, token in enumerate(ids))
        samples.append(Sample(f"random#{i}", ids, labels))
    return SampleSet(samples, "random")


def soir(model: nn.Module, sets: tuple[SampleSet, ...], need_update: bool) -> None:
    """The ranking as `fillm.rank` does it, checks included."""
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    verify(capture, sets[1])
    passes = Passes(Console.silent(), tokens_per_batch=TOKENS_PER_BATCH)
    rank_soir(passes, capture, *sets, damping=0.1, tolerance=1e-3, need_update=need_update)


def masked_step(model: nn.Module, sets: tuple[SampleSet, ...]) -> Callable[[], None]:
    """One step of unlearning inside a tenth of the rows of every matrix; the optimiser is made before.

    The loss of the forget set rises and that of the retain set falls (`grad-diff`): forward and backward over both,
    then clipping and AdamW on float32 copies of the selected weights, as `fillm.unlearn` does it.
    """
    mask = some_rows(model, MASK_SHARE)
    selected = [parameter for name, parameter in model.named_parameters() if name in mask]
    optimizer = MaskedOptimizer(torch.optim.AdamW(selected, lr=1e-6), mask, model, master_weights=True)

    def step() -> None:
        with frozen_outside(model, mask):
            for sign, samples in zip((-1.0, 1.0), sets, strict=True):
                for loss in batch_losses(model, samples, TOKENS_PER_BATCH):
                    (sign * loss).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def matrix_flop(model: nn.Module, sets: tuple[SampleSet, ...]) -> dict[str, float]:
    """FLOP of matrix products that each thing needs, by `fillm.rank.costs`; the head counts where loss is carried.

    Plain forward + backward and the masked step compute the head at every position, and a sketch projects: neither is
    counted, so what they reach is more than the utilisation says.
    """
    tensors = catalogue(model)
    costs = Costs.of(model, tensors, tensors)

    by_set = dict(zip(("forget", "retain"), sets, strict=True))

    def needed(passes: Iterable[MethodPass]) -> float:
        total = 0.0
        for one in passes:
            shapes = batch_shapes(by_set[one.which], TOKENS_PER_BATCH, "right")
            total += one.times * sum(planned_flop(one, shapes, costs, checkpointing=False).values())
        return total

    both, sketches = (passes_of(config) for config in (RankConfig(), RankConfig(compression=SKETCH)))
    plain = needed(MethodPass("plain", which, products=1) for which in by_set)
    return {
        "plain": plain,
        "certified": needed(one._replace(products=1) for one in both),  # without the weighted sum
        "with u": needed(both),
        SKETCH: needed(sketches),
        "masked step": plain,
    }


def ranking_rows(device: torch.device, shrink: int, clock: Clock) -> Iterator[Row]:
    """Samples a second, ratio to plain, share of the matrix ceiling and peak memory, for every shape and element type.

    A shape for which memory or time does not suffice, and a ranking that breaks, are a row that says so.
    """
    for shape in SHAPES:
        for dtype in shape.dtypes:
            row: Row = {"model": shape.name, "dtype": str(dtype).removeprefix("torch.")}
            row["parameters"] = shape.parameters(shrink)
            needed = row["parameters"] * (ACCUMULATED + dtype.itemsize) + BATCH_BYTES // shrink
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else needed
            if needed > free:
                why = f"left out: takes about {needed / 1e9:.0f} GB; {free / 1e9:.0f} GB are free"
                yield {**row, "what": "all", "verdict": why}
            elif clock.left() < LEAST_SECONDS:
                yield {**row, "what": "all", "verdict": "left out: time"}
            else:
                yield from _guarded(row, device, shape, dtype, shrink, clock)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _guarded(row: Row, device: torch.device, shape: Shape, dtype: torch.dtype, shrink: int, clock: Clock) -> list[Row]:
    try:
        return [{**row, **found} for found in _measured(device, shape, dtype, shrink, clock)]
    except torch.OutOfMemoryError as error:
        return [{**row, "what": "all", "verdict": f"left out: out of memory: {' '.join(str(error).split())[:200]}"}]
    except Exception as error:  # whatever a driver raises
        why = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return [{**row, "what": "all", "verdict": why}]


def _random_model(device: torch.device, shape: Shape, dtype: torch.dtype, shrink: int) -> nn.Module:
    """Random weights made in their own type, so that none are held twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(shape.config(shrink)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _measured(device: torch.device, shape: Shape, dtype: torch.dtype, shrink: int, clock: Clock) -> list[Row]:
    model = _random_model(device, shape, dtype, shrink)
    sets = tuple(
        random_samples(max(7, count // shrink), model.config.vocab_size, seed) for seed, count in ((1, 40), (2, 360))
    )
    # Each makes what is timed: nothing of the masked step's is to stay in memory beside the others.
    calls: dict[str, Callable[[], Callable[[], object]]] = {
        "plain": lambda: partial(forward_backward, model, sets, TOKENS_PER_BATCH),
        "certified": lambda: partial(soir, model, sets, False),
        "with u": lambda: partial(soir, model, sets, True),
        SKETCH: lambda: partial(rank_sketched, model, *sets, SKETCH, SKETCH_DIM, TOKENS_PER_BATCH),
        "masked step": lambda: masked_step(model, sets),
    }
    flop = matrix_flop(model, sets)
    rate = ceilings(device, shrink)[f"matrix {dtype}"]
    taken: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, int] = {}
    for turn in range(shape.rounds + 1):
        if turn > 1 and clock.left() <= 0:
            break
        for name, make in calls.items():
            call = make()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            begun = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[name] = torch.cuda.max_memory_allocated(device)
            if turn:
                taken[name].append(time.perf_counter() - begun)
            del call
    count = sum(len(samples) for samples in sets)
    rows = []
    for name, own in taken.items():
        ratios = [a / b for a, b in zip(own, taken["plain"], strict=True)]
        rows.append({
            "what": name, "samples": count, "rounds": len(own), "samples_per_second": count / median(own),
            "over_plain": median(ratios), "over_plain_min": min(ratios), "over_plain_max": max(ratios),
            "matrix_flop": flop[name], "matrix_ceiling": rate, "flop_utilisation": flop[name] / median(own) / rate,
            "peak_bytes": peaks.get(name, ""), "verdict": "no target",
        })  # fmt: skip
    return rows
