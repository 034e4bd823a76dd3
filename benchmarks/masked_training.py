"""What a mask saves: python -m benchmarks.masked_training --out benchmarks/results/masked_training_cpu.csv

Two questions of a Llama of about 100M weights (tied embeddings), each answered beside torch's AdamW on every weight:

* `optimiser`: AdamW on 5 % of the rows of every matrix: bytes of its state, and seconds of `step()` alone.
* `training`: every weight of the top quarter of the layers, the rest frozen: seconds of a whole step (forward,
  backward, clipping, AdamW), and the most bytes resident beyond those of Python and torch, in a process of its own
  (Linux).

Variants take turns in every round; a row has the median, least and most over the rounds and, per round, the share of
the time of a baseline. A machine that does something else as well says little.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from fillm_kernels import Selection, select_rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.end_to_end.results import spread_of
from benchmarks.kernels.memory import extra_bytes
from benchmarks.kernels.rows import save
from fillm import MaskedOptimizer, frozen_outside

DENSE = {"dense foreach": {"foreach": True}, "dense fused": {"fused": True}}
MASKED = "masked"
Row = dict[str, Any]
Mask = Mapping[str, "Rows"]


@dataclass(frozen=True)
class Sizes:
    layers: int = 12
    width: int = 768
    vocabulary: int = 32000
    batch: int = 4
    tokens: int = 128


@dataclass(frozen=True)
class Rows:
    """The part of a mask that selects rows of one tensor."""

    shape: tuple[int, ...]
    rows: Tensor
    bits: None = None

    @property
    def count(self) -> int:
        return self.rows.numel() * (torch.Size(self.shape).numel() // self.shape[0])

    def selection(self, device: torch.device) -> Selection:
        return select_rows(self.rows.to(device), self.shape)


def build(sizes: Sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.width * 8 // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        num_key_value_heads=max(1, sizes.width // 64),
        max_position_embeddings=sizes.tokens,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def some_rows(model: nn.Module, share: float) -> Mask:
    """Random rows of every matrix."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: Rows(tuple(p.shape), torch.randperm(p.shape[0], generator=draw)[: round(share * p.shape[0])].sort()[0])
        for name, p in model.named_parameters()
        if p.ndim == 2
    }


def top_layers(model: LlamaForCausalLM, share: float) -> Mask:
    """Every weight of the last layers."""
    layers = len(model.model.layers)
    first = layers - round(share * layers)
    return {
        f"model.layers.{index}.{name}": Rows(tuple(p.shape), torch.arange(p.shape[0]))
        for index in range(first, layers)
        for name, p in model.model.layers[index].named_parameters()
    }


def optimiser_rows(sizes: Sizes, rounds: int) -> list[Row]:
    """Stage `optimiser`; one model serves all variants, whose gradients stay what they are."""
    model = build(sizes)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    mask = some_rows(model, 0.05)
    optimizers = {MASKED: MaskedOptimizer(torch.optim.AdamW(model.parameters()), mask, model)}
    optimizers |= {name: torch.optim.AdamW(model.parameters(), **flags) for name, flags in DENSE.items()}
    seconds = _in_turns({name: each.step for name, each in optimizers.items()}, rounds)
    bytes_of = {name: _state_bytes(each) for name, each in optimizers.items()}
    selected = sum(entry.count for entry in mask.values())
    return _rows("optimiser", model, selected, rounds, seconds, {"state_bytes": bytes_of})


def training_rows(sizes: Sizes, rounds: int) -> list[Row]:
    """Stage `training`."""
    model = build(sizes)
    selected = sum(entry.count for entry in top_layers(model, 0.25).values())
    seconds = _in_turns({name: training_step(sizes, name) for name in (MASKED, *DENSE)}, rounds)
    peaks = {}
    for name in (MASKED, *DENSE):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            peaks[name] = process.submit(peak_bytes, sizes, name, torch.get_num_threads()).result()
    found = {name: peak for name, peak in peaks.items() if peak is not None}
    return _rows("training", model, selected, rounds, seconds, {"peak_bytes": found})


def training_step(sizes: Sizes, variant: str) -> Callable[[], None]:
    """A whole step of a model of its own."""
    model = build(sizes)
    ids = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.tokens), generator=torch.Generator().manual_seed(2))
    if variant == MASKED:
        mask = top_layers(model, 0.25)
        frozen_outside(model, mask)
        optimizer = MaskedOptimizer(torch.optim.AdamW(model.parameters()), mask, model)
        clip: Callable[[], Tensor] = partial(optimizer.clip_grad_norm_, 1.0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **DENSE[variant])
        clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), 1.0)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        clip()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(sizes: Sizes, variant: str, threads: int) -> int | None:
    """Most bytes of building a model and taking two steps; None where the system does not say."""
    torch.set_num_threads(threads)

    def run() -> None:
        step = training_step(sizes, variant)
        step()
        step()

    return extra_bytes(run)


def _in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rows(
    stage: str,
    model: nn.Module,
    selected: int,
    rounds: int,
    seconds: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Mapping[str, int]],
) -> list[Row]:
    made = {"parameters": sum(p.numel() for p in model.parameters()), "selected": selected, "rounds": rounds}
    made["threads"] = torch.get_num_threads()
    rows = []
    for name, found in seconds.items():
        row: Row = {"stage": stage, "variant": name, **made, **spread_of("seconds", found)}
        for baseline in DENSE:
            shares = [own / peer for own, peer in zip(found, seconds[baseline], strict=True)]
            row |= spread_of(f"time_of_{baseline.replace(' ', '_')}", shares)
        for measure, values in sizes.items():
            if name in values:
                row |= {measure: values[name]} | {
                    f"{measure}_of_{baseline.replace(' ', '_')}": values[name] / values[baseline] for baseline in DENSE
                }
        rows.append(row)
        print("  ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in row.items()))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="CSV to write")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    sizes = Sizes(**{name: getattr(given, name) for name in vars(Sizes())})
    save(given.out, [*optimiser_rows(sizes, given.rounds), *training_rows(sizes, given.rounds)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
