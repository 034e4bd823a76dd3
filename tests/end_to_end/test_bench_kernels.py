"""`python -m benchmarks.kernels.bench_<op>`, small: checks first, then rows with spread, ceilings and ratios."""

import csv
import importlib
import itertools
from pathlib import Path

import fillm_kernels as fk
import pytest
import torch

from benchmarks.kernels import bench_factored_sketch, bench_sketch, bench_top_mask, layers, peers, streams
from benchmarks.kernels.layers import Layer
from benchmarks.kernels.memory import extra_bytes

MODULES = sorted(path.stem for path in Path(layers.__file__).parent.glob("bench_*.py"))
# Benchmarks that cover several ops, or one under another name.
COVERS = {
    "bench_masked_steps": {"masked_adamw_", "masked_sophia_", "masked_norm"},
    "bench_weighted_outer": {"weighted_outer_"},
    "bench_matmul": set(),
}
LONG = ("bench_masked_steps", "bench_outer_sketch", "bench_factored_sketch")


@pytest.fixture
def small(monkeypatch):
    """Sizes at which everything takes a moment; the number of threads comes back."""
    threads = torch.get_num_threads()
    for module in map(importlib.import_module, [f"benchmarks.kernels.{name}" for name in MODULES]):
        for name, value in (
            ("LAYERS", (Layer(5, 3, 20, 12),)),
            ("ENTRIES", 1 << 12),
            ("SHAPES", ((2, 4097, 64, "oporp", torch.float32), (2, 4097, 64, "sjlt", torch.bfloat16))),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    if hasattr(bench := importlib.import_module("benchmarks.kernels.bench_soir_sweep"), "CASES"):
        monkeypatch.setattr(bench, "CASES", {"small": (2, 9, 33, torch.float32)})
    monkeypatch.setattr(layers, "LAYERS", (Layer(5, 3, 20, 12),))
    monkeypatch.setattr(layers, "CEILING_SIZE", 32)
    for module in (layers, streams, bench_top_mask):
        monkeypatch.setattr(module, "COPY_ENTRIES", 1 << 10)
    yield
    torch.set_num_threads(threads)


def test_every_op_has_a_benchmark():
    covered = set().union(*(COVERS.get(name, {name.removeprefix("bench_")}) for name in MODULES))
    assert covered == {*fk.backends(), "outer_sketch"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in MODULES])
def test_a_benchmark_writes_its_rows(name, small, tmp_path):
    module = importlib.import_module(f"benchmarks.kernels.{name}")
    module.main(["--threads", "1", "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows and any(key.startswith("bench_") for key in vars(module))
    for row in rows:
        assert float(row["milliseconds"]) > 0.0 and "-" in row["spread"] and row["cpu"] and row["commit"]
        ceiling = next(value for key, value in row.items() if "ceiling" in key or "copy_g" in key)
        assert float(ceiling) > 0.0
        assert any(value for key, value in row.items() if key.endswith("/ op")), row


def test_the_large_mask_is_compared_with_a_sort_bit_by_bit(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_top_mask, "BLOCK", 1 << 8)
    bench_top_mask.main(["--billion", "10007", "--csv", str(tmp_path / "rows.csv")])
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["bits that differ from a sort"] == "0" and "10007" in row["case"]


def test_one_wrong_bit_among_ties_is_found():
    scores = [torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.0, 5.0, 1.0]), torch.ones(9)]
    bits = fk.top_mask(scores, 6).bits
    assert bench_top_mask.wrong_bits(scores, bits, 6) == 0
    bits[1][0] ^= 2
    assert bench_top_mask.wrong_bits(scores, bits, 6) == 1


def test_extra_memory_is_that_of_the_call():
    size = 64 << 20
    found = extra_bytes(lambda: torch.ones(size // 4))
    # The kernel counts resident pages in batches per thread.
    assert found is None or 0.9 * size <= found <= 2 * size


def test_an_op_that_is_off_is_not_timed(monkeypatch, small):
    right, calls = bench_factored_sketch.factored_sketch, itertools.count(1)
    monkeypatch.setattr(bench_factored_sketch, "factored_sketch", lambda *given: right(*given) * next(calls))
    with pytest.raises(AssertionError, match="factored is off by"):
        bench_factored_sketch.main([])


def test_a_package_that_is_missing_is_named_and_left_out(monkeypatch):
    monkeypatch.setattr(peers, "import_module", lambda name: __import__("no_such_package_" + name))
    g = torch.randn(2, 100)
    assert peers.missing("scipy", "traker").endswith("not installed: scipy, traker")
    assert set(bench_sketch.baselines(g, 10)) == {"dense kept"}
    assert peers.opacus_norms(g, g, 1) is None
