"""Does `--dry-run` say what a run takes? python -m benchmarks.end_to_end.bench_plan

Randomly initialised models of four families, each of some tens of millions of weights. For every model and setting,
`fillm.rank --dry-run` plans in one fresh process from config.json alone, and `fillm.rank` runs in another, the sharded
settings under torchrun. Planned is the peak that the plan prints; measured is the largest `peak_memory_bytes` of
run.yaml: the peak resident size (VmHWM) of the process, of several the largest. Memory says the same on a busy machine.
"""

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.end_to_end.commands import printed_command, run_bench, timed_command
from benchmarks.end_to_end.results import Row
from benchmarks.kernels.rows import save
from fillm.errors import UsageError

PROGRAM = "python -m benchmarks.end_to_end.bench_plan"
PROCESSES = 2
VOCABULARY = 8192
FORGET, RETAIN = (0, 6), (6, 18)  # samples by number
_UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ROTARY = {**_SHARED, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=512, n_embd=512, n_layer=9, n_head=8, bos_token_id=1, eos_token_id=2
    )


MODELS: Mapping[str, Callable[[], Any]] = {
    "Llama": lambda: transformers.LlamaConfig(**_ROTARY, intermediate_size=1408, num_hidden_layers=8),
    "GPT-2": _gpt2,
    "Gemma 2": lambda: transformers.Gemma2Config(
        **_ROTARY, intermediate_size=2048, num_hidden_layers=7, query_pre_attn_scalar=64, sliding_window=64
    ),
    "Qwen3-MoE": lambda: transformers.Qwen3MoeConfig(
        **_ROTARY, moe_intermediate_size=512, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
}  # fmt: skip
SETTINGS: Mapping[str, Sequence[str]] = {
    "certified": [],
    "update": ["--save-update"],
    "recomputed": ["--gradient-checkpointing"],
    "sketched": ["--compression", "countsketch", "--sketch-dim", "65536"],
    "sharded": ["--shard"],
    "sharded update": ["--shard", "--save-update"],
}
_UNSHARDED = ("Qwen3-MoE",)  # its files name experts otherwise than the model does, which --shard refuses


def row_of(number: int) -> dict[str, list[int]]:
    """A sample of 100 to 200 tokens, of which a third is the prompt."""
    length = 100 + 37 * number % 101
    ids = [3 + (number * 7919 + position * 104729) % (VOCABULARY - 3) for position in range(length)]
    return {"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]}


def write_inputs(folder: Path, names: Sequence[str]) -> int:
    """Writes data and models: of each `NAME/config` the configuration alone, `NAME/model` with weights.

    Returns:
        The number of tokens of both sets.
    """
    tokens = 0
    for which, numbers in (("forget", range(*FORGET)), ("retain", range(*RETAIN))):
        rows = [row_of(number) for number in numbers]
        tokens += sum(len(row["input_ids"]) for row in rows)
        (folder / f"{which}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in names:
        config = MODELS[name]()
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name / "model")
        config.save_pretrained(folder / name / "config")
    return tokens


def expected_peak(printed: str) -> float:
    """Bytes, of the line `expected peak` of a plan."""
    number, unit = re.search(r"^  expected peak +([\d.,]+) (\w+)$", printed, re.MULTILINE).groups()
    return float(number.replace(",", "")) * _UNITS[unit]


def compare(folder: Path, name: str, setting: str, tokens_per_batch: int) -> Row:
    """Plans and runs one model in one setting: both peaks, and the planned over the measured."""
    processes = PROCESSES if "--shard" in SETTINGS[setting] else 1
    words = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl"), "--device", "cpu"]
    words += ["--tokens-per-batch", str(tokens_per_batch), *SETTINGS[setting]]
    devices = ["--plan-devices", str(processes)] if processes > 1 else []
    said = printed_command("rank", ["--model", str(folder / name / "config"), *words, "--dry-run", *devices], threads=1)
    planned = expected_peak(said)
    _, record = timed_command(
        "rank", ["--model", str(folder / name / "model"), *words], folder / "run", threads=1, processes=processes
    )
    measured = max(one["peak_memory_bytes"] for one in record["passes"])
    weights = int(re.search(r"\(([\d,]+) parameters\)", said)[1].replace(",", ""))
    return {
        "model": name, "parameters": weights, "setting": setting, "processes": processes,
        "planned_bytes": int(planned), "measured_bytes": measured, "planned_over_measured": planned / measured,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as docs/rank.md shows them: planned over measured MiB, and their ratio."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    found = {(row["model"], row["setting"]): row for row in rows}
    lines = ["| setting | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for setting, words in SETTINGS.items():
        cells = []
        for name in names:
            row = found.get((name, setting))
            sizes = [int(row[f"{which}_bytes"]) for which in ("planned", "measured")] if row else []
            said = [f"{size / 2**20:.0f}" for size in sizes]
            cells.append(f"{said[0]} / {said[1]}: {sizes[0] / sizes[1]:.2f}" if said else "refused")
        lines.append(f"| `{' '.join(words)}` | ".replace("| `` |", "| defaults |") + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints a line a row, writes the CSV; the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--tokens-per-batch", type=int, default=1024, metavar="N", help="as of fillm.rank")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_cpu.csv"), metavar="FILE")
    given = parser.parse_args(argv)
    chosen = [word for flag in ("models", "settings") if (words := getattr(given, flag)) != parser.get_default(flag)
              for word in (f"--{flag}", *words)]  # fmt: skip
    given.command = shlex.join([*PROGRAM.split(), *chosen, "--tokens-per-batch", str(given.tokens_per_batch)])
    return run_bench(_bench, parser, given)


def _bench(given: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as created:
        folder = Path(created)
        tokens = write_inputs(folder, given.models)
        for name in given.models:
            for setting in given.settings:
                if name in _UNSHARDED and "--shard" in SETTINGS[setting]:
                    continue
                row = compare(folder, name, setting, given.tokens_per_batch)
                rows.append(row)
                print(
                    f"{name}, {setting}: planned {row['planned_bytes'] / 2**20:.0f} MiB, measured "
                    f"{row['measured_bytes'] / 2**20:.0f} MiB, ratio {row['planned_over_measured']:.3f}",
                    flush=True,
                )
    if not rows:
        raise UsageError("nothing to compare: a mixture of experts is not sharded")
    made = {
        "threads": 1, "tokens": tokens, "tokens_per_batch": given.tokens_per_batch,
        "transformers": transformers.__version__, "command": given.command,
    }  # fmt: skip
    save(given.out, [row | made for row in rows])


if __name__ == "__main__":
    sys.exit(main())
