"""The page on the store: its lines of numpy read what was stored."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fillm.statistics import SketchStore, store_writer
from tests.statistics.store_feed import MAPS, ROUNDED, SETTINGS, build

PAGE = Path(__file__).resolve().parents[2] / "docs" / "store.md"


@pytest.mark.parametrize("given", [SETTINGS, ROUNDED])
def test_the_lines_of_numpy_read_a_store(tmp_path, monkeypatch, given):
    monkeypatch.setattr(store_writer, "BLOCK_SAMPLES", 4)
    build(tmp_path / "store", 7, given)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names = {"STORE": str(tmp_path / "store")}
    exec(code, names)
    store = SketchStore.open(tmp_path / "store")
    assert names["ids"] == store.ids and list(names["sketches"]) == list(MAPS)
    for index, name in enumerate(MAPS):
        found = torch.from_numpy(np.array(names["sketches"][name], dtype=np.float32))
        assert torch.equal(found, store.sketches(name).float())
        assert np.array_equal(names["squared_norms"][:, index], store.q[name].numpy())


def test_the_sizes_of_blocks_are_those_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert f"{store_writer.BLOCK_BYTES >> 20} MiB or {store_writer.BLOCK_SAMPLES} samples" in text
