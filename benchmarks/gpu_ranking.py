"""The ranking of a randomly initialised model beside plain forward + backward, for `python -m benchmarks.gpu`."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.end_to_end.published import trainable
from fillm.capture import Capture, verify
from fillm.data import Sample, SampleSet, collate, plan_batches
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.rank.soir import rank_soir

TOKENS_PER_BATCH = 8192
ROUNDS = 3
# TOFU's rows: 28, 62 and 112 tokens at the least, in the middle and at the most.
LENGTHS = (28, 44, 56, 62, 70, 84, 112)


def llama_1b(shrink: int) -> LlamaConfig:
    """The published shape of Llama-3.2-1B, its widths and depth divided by `shrink`."""
    hidden = max(64, 2048 // shrink)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=max(2, 16 // shrink),
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), head_dim=64,
        vocab_size=max(256, 128256 // shrink), tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip


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


def plain(model: nn.Module, sets: tuple[SampleSet, ...]) -> None:
    """Forward and backward with parameter gradients over the same batches."""
    with trainable(model):
        for samples in sets:
            for members in plan_batches(samples.lengths, TOKENS_PER_BATCH):
                batch = collate(samples, members).to(model.device)
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
                      use_cache=False).loss.backward()  # fmt: skip
                model.zero_grad(set_to_none=True)


def soir(model: nn.Module, sets: tuple[SampleSet, ...], need_update: bool) -> None:
    """The ranking as `fillm.rank` does it, checks included."""
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    verify(capture, sets[1])
    passes = Passes(Console.silent(), tokens_per_batch=TOKENS_PER_BATCH)
    rank_soir(passes, capture, *sets, damping=0.1, tolerance=1e-3, need_update=need_update)


def ranking_rows(device: torch.device, shrink: int) -> list[dict[str, Any]]:
    """Seconds a sample, ratio to plain and peak memory of the ranking in float32 and bfloat16."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(llama_1b(shrink)).to(dtype).eval().requires_grad_(False)
        sets = tuple(
            random_samples(max(7, count // shrink), model.config.vocab_size, seed)
            for seed, count in ((1, 40), (2, 360))
        )
        calls: dict[str, Callable[[], None]] = {
            "plain": lambda model=model, sets=sets: plain(model, sets),
            "certified": lambda model=model, sets=sets: soir(model, sets, False),
            "with u": lambda model=model, sets=sets: soir(model, sets, True),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        peaks: dict[str, int] = {}
        for turn in range(ROUNDS + 1):
            for name, call in calls.items():
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
        count = sum(len(samples) for samples in sets)
        size = sum(p.numel() for p in model.parameters())
        for name, own in taken.items():
            ratios = [a / b for a, b in zip(own, taken["plain"], strict=True)]
            rows.append({
                "what": name, "parameters": size, "dtype": str(dtype).removeprefix("torch."), "samples": count,
                "samples_per_second": count / median(own), "over_plain": median(ratios), "over_plain_min": min(ratios),
                "over_plain_max": max(ratios), "peak_bytes": peaks.get(name, ""),
            })  # fmt: skip
        del model, calls
    return rows
