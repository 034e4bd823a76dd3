"""Small run folders, as the commands write them, made by hand."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import fillm

VERSIONS = {"fillm": fillm.__version__}


def write(folder: Path, record: dict[str, Any], tables: dict[str, dict[str, list[Any]]], **files: Any) -> Path:
    """A folder with a record, Parquet tables and JSON files (`summary={...}` becomes `summary.json`)."""
    folder.mkdir(parents=True)
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "run.yaml").write_text(yaml.safe_dump({"versions": VERSIONS, **record}), encoding="utf-8")
    return folder


def rank(folder: Path, scores: list[float], model: str = "m", granularity: str = "tensor", **settings: Any) -> Path:
    """A ranking of a model with `attn` and `mlp` of every layer and an embedding, whose scores come in that order."""
    layers = (len(scores) - 1) // 2
    names = [f"h.{layer}.{part}.weight" for layer in range(layers) for part in ("attn.q", "mlp.up")]
    columns = {
        "name": [*names, "wte.weight"],
        "kind": [*["attn", "mlp"] * layers, "embed"],
        "layer": [*(layer for layer in range(layers) for _ in range(2)), -1],
        "numel": [4] * len(scores),
        "score": [float(score) for score in scores],
    }
    method, objective = settings.pop("method", "soir"), settings.setdefault("objective", "forget")
    record = {
        "ranking": {"method": method, "objective": objective, "granularity": granularity, "entries": len(scores)},
        "settings": {"model": f"models/{model}", "method": method, "score": None, **settings},
        "fingerprints": {"model": model},
    }
    return write(folder, record, {"ranking": columns})


def unlearn(
    folder: Path, path: list[tuple[int, float | None, float | None]], end: tuple[float, float], **settings: Any
) -> Path:
    """An unlearning: (step, forget loss, retain loss) before and of its log; the losses it ended with."""
    (_, *before), *log = path
    kept = settings.pop("kept_step", log[-1][0] if log else 0)
    told = {
        "forget_loss": {"before": before[0], "after": end[0]},
        "retain_loss": {"before": before[1], "after": end[1]},
        "kept_step": kept,
        "steps": len(log),
    }
    settings = {"loss": "npo", "select": "top:0.1", "seed": 0, "model": "models/m", "lr": 1e-3, **settings}
    columns = {
        "step": [step for step, *_ in log],
        "forget_loss": pa.array([forget for _, forget, _ in log], pa.float64()),
        "retain_loss": pa.array([retain for *_, retain in log], pa.float64()),
    }
    return write(folder, {"settings": settings, "result": told}, {"log": columns}, verification=told)


def evaluate(folder: Path, summary: dict[str, Any], **settings: Any) -> Path:
    """An evaluation with that summary."""
    return write(folder, {"settings": settings}, {"rows": {"set": ["forget"], "row": [0]}}, summary=summary)


def compression(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The result file of the study of sketches."""
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    return path


def result_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The CSV of a study; what is not a number is written as the benchmarks write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def masked(choice: str, seed: int, low: float, high: float = math.nan, loss: str = "ga", **others: Any) -> dict:
    """A row of a study of masks: the retain loss at both levels of the forget loss, 0.1 before."""
    return {
        "family": "llama", "seed": seed, "choice": choice, "loss": loss, "retain_start": 0.1,
        "forget_low": 1.0, "forget_high": 2.0, "retain_at_low": low, "retain_at_high": high, **others,
    }  # fmt: skip


def experiments(folder: Path) -> Path:
    """Two studies as `python -m benchmarks.experiment` leaves them, with the file that says what one is about."""
    seeds = range(3)
    masks = [masked(name, seed, low + 0.1 * seed, 2.0 * low + 0.1 * seed, loss)
             for loss in ("ga", "npo") for seed in seeds
             for name, low in (("whole model", 0.5), ("soir top, 0.1", 0.75), ("random 0, 0.1", 0.4))]  # fmt: skip
    made = {"commit": "0123", "command": "python -m benchmarks.experiment which_mask"}
    result_file(folder / "results" / "experiments" / "which_mask.csv", [{**row, **made} for row in masks])
    places = [(-1, "embed"), *((layer, kind) for layer in (0, 1) for kind in ("mlp", "attn"))]
    shifts = [
        {"family": "llama", "seed": seed, "tensor": f"h.{layer}.{kind}", "kind": kind, "layer": layer,
         "relative_shift": 1.0 + seed + layer}
        for seed in seeds for layer, kind in places
    ]  # fmt: skip
    result_file(folder / "results" / "experiments" / "moved.csv", shifts)
    told = {"study": "x", "title": "Which mask keeps most", "claim": "The top is <b>best</b>.", "source": "A paper."}
    (folder / "experiments").mkdir()
    (folder / "experiments" / "which_mask.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return folder / "results" / "experiments"
