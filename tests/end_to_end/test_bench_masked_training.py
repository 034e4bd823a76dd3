"""The benchmark of masked training measures what it says: sizes only, no times."""

import csv

import pytest
import torch

from benchmarks import masked_training as bench


@pytest.mark.slow
def test_the_file_has_every_variant_and_the_counted_bytes(tmp_path):
    out = tmp_path / "rows.csv"
    sizes = ["--layers", "4", "--width", "64", "--vocabulary", "99", "--batch", "2", "--tokens", "8"]
    threads = torch.get_num_threads()
    assert bench.main([*sizes, "--rounds", "1", "--threads", str(threads), "--out", str(out)]) == 0
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    variants = [bench.MASKED, *bench.DENSE]
    assert [(r["stage"], r["variant"]) for r in rows] == [(s, v) for s in ("optimiser", "training") for v in variants]
    weights = 99 * 64 + 64 + 4 * (4 * 64 * 64 + 3 * 64 * 170 + 2 * 64)
    assert {int(r["parameters"]) for r in rows} == {weights}
    # 5 % of the rows of every matrix: 5 of 99, 3 of 64 and 8 of 170.
    selected = 5 * 64 + 4 * (4 * 3 * 64 + 2 * 8 * 64 + 3 * 170)
    assert int(rows[0]["selected"]) == selected and int(rows[0]["state_bytes"]) == 8 * selected + 4 * (1 + 4 * 7)
    assert int(rows[1]["state_bytes"]) == 8 * weights + 4 * (2 + 4 * 9)
    assert int(rows[3]["selected"]) == 4 * 64 * 64 + 3 * 64 * 170 + 2 * 64  # one layer of four
