"""A very small architecture and data set, and a training of them that takes a fraction of a second."""

import json

import pytest

from fillm.finetune import finetune_model

CITIES = ["Oslo", "Quito", "Hanoi", "Accra", "Lima", "Riga", "Doha", "Sofia", "Minsk", "Cairo", "Kyoto"]


@pytest.fixture
def data(tmp_path):
    """Eleven rows: no multiple of any batch size used here."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": f"Where was writer number {n} born{' and raised' * (n % 3)}?", "answer": f"In {city}."}
        for n, city in enumerate(CITIES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def architecture(tmp_path):
    """A one-block GPT-2 with dropout: what is random in a step has to be the same after a resume."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}))
    return str(path)


@pytest.fixture
def train(data, architecture, tmp_path):
    """`train("name", **settings)` trains into tmp_path/name."""

    def run(name, rows=None, **settings):
        chosen = {"vocab_size": 300, "epochs": 3, "batch_size": 4, "lr": 1e-2, "device": "cpu", **settings}
        if "model" not in chosen:
            chosen = {"architecture": architecture, **chosen}
        return finetune_model(data if rows is None else rows, out=str(tmp_path / name), show=False, **chosen)

    return run
