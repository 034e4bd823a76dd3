"""Small run folders, as the commands write them, made by hand."""

import json
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
