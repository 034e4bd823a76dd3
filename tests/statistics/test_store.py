"""A sketch store gives back what it was fed: through blocks, batches of any size, appends, and while it is written."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fillm.statistics import SketchStore, StoredSketches, holds_store, store_writer
from tests.statistics.store_feed import (
    MAPS,
    MODEL,
    REACHED,
    ROUNDED,
    SETTINGS,
    SketchedGradients,
    build,
    expected_rows,
    feed,
    gradients,
    loss,
    plan,
    samples,
)

COUNT = 11


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(store_writer, "BLOCK_SAMPLES", 4)


def assert_holds(store, positions, dtype=torch.float32):
    """Every row of every tensor, its norm and what is known of its sample."""
    given = samples(max(positions, default=-1) + 1)
    assert store.positions.tolist() == positions and store.rows == len(positions)
    assert store.ids == [given[p].id for p in positions]
    assert store.fingerprints == [given[p : p + 1].fingerprint for p in positions]
    assert store.tokens.tolist() == [given[p].num_tokens for p in positions]
    assert store.losses.tolist() == [loss(p) for p in positions]
    g = gradients(len(given))
    for name, to in MAPS.items():
        found = store.sketches(name)
        assert found.dtype == dtype and found.shape == (len(positions), to.dim)
        assert torch.equal(found, expected_rows(name, positions, dtype))
        # Whole numbers below 2^53, and so exact.
        norms = g[name][positions].double().flatten(1).square().sum(1) if name in REACHED else torch.zeros(1)
        assert torch.equal(store.q[name], norms.double().expand(len(positions)))
        assert torch.equal(store.squared_norms(name), store.q[name]) and store.q[name].dtype == torch.float64


@pytest.mark.parametrize(("given", "dtype"), [(SETTINGS, torch.float32), (ROUNDED, torch.bfloat16)])
def test_what_goes_in_comes_out(tmp_path, given, dtype):
    build(tmp_path / "deep" / "store", COUNT, given)
    store = SketchStore.open(tmp_path / "deep" / "store")
    assert store.complete and store.manifest.settings == given
    assert_holds(store, list(range(COUNT))[::-1], dtype)
    assert store.check(MODEL, given, samples(COUNT), MAPS) == range(COUNT, COUNT)
    assert {name: (t.kind, t.dim, t.shape, t.seed) for name, t in store.tensors.items()} == {
        name: (to.kind, to.dim, to.shape, to.seed) for name, to in MAPS.items()
    }


def test_norms_are_of_the_gradients_and_not_of_what_rounding_left(tmp_path):
    build(tmp_path / "s", COUNT, ROUNDED)
    store = SketchStore.open(tmp_path / "s")
    rounded = store.sketches("norm").double().square().sum(1)
    assert float(((rounded - store.q["norm"]) / store.q["norm"]).abs().max()) > 1e-4  # bfloat16 keeps 8 bits


def test_what_is_done_to_sketches_does_not_reach_the_store(tmp_path):
    build(tmp_path / "s", COUNT)
    SketchStore.open(tmp_path / "s").sketches("weight").zero_()
    assert_holds(SketchStore.open(tmp_path / "s"), list(range(COUNT))[::-1])


@settings(max_examples=12, deadline=None)
@example(count=9, size=1, most=9, heavy=2)
@example(count=9, size=2, most=3, heavy=9)
@given(count=st.integers(0, 9), size=st.integers(1, 5), most=st.integers(1, 9), heavy=st.integers(1, 9))
def test_blocks_end_after_the_batch_that_fills_them(tmp_path_factory, count, size, most, heavy):
    path = tmp_path_factory.mktemp("blocks") / "s"
    # A row: 16 + 6 + 5 + 16 numbers of 4 bytes and 4 of 8.
    bytes_of_row = 204
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "BLOCK_SAMPLES", most)
        patch.setattr(store_writer, "BLOCK_BYTES", (heavy - 1) * bytes_of_row + 1)
        with StoredSketches(path, MAPS, samples(count), MODEL, SETTINGS) as store:
            feed(store, plan(range(count), size))
    blocks, full = [], 0
    for batch in plan(range(count), size):
        full += len(batch)
        if full >= min(most, heavy):
            blocks.append(full)
            full = 0
    found = SketchStore.open(path)
    assert [entry.rows for entry in found.manifest.blocks] == blocks + ([full] if full else [])
    assert_holds(found, list(range(count))[::-1])
    assert found.complete == (count > 0)


def test_an_appended_store_answers_as_one_built_at_once(tmp_path):
    for count in (3, 8, 8, COUNT):
        build(tmp_path / "grown", count)
    build(tmp_path / "whole", COUNT)
    grown, whole = SketchStore.open(tmp_path / "grown"), SketchStore.open(tmp_path / "whole")
    assert_holds(grown, [2, 1, 0, 7, 6, 5, 4, 3, 10, 9, 8])
    assert [s.samples for s in grown.manifest.segments] == [3, 5, 3] and grown.complete
    one, other = grown.positions.argsort(), whole.positions.argsort()
    for name in MAPS:
        assert torch.equal(grown.sketches(name)[one], whole.sketches(name)[other])
        assert torch.equal(grown.q[name][one], whole.q[name][other])


def test_a_store_that_is_complete_asks_for_no_pass_and_stays_as_it_is(tmp_path):
    build(tmp_path / "s", COUNT)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")}
    with StoredSketches(tmp_path / "s", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        assert list(store.positions) == []
        done, losses, fallback = store.resume_point([])
        store.close()
    assert (done, fallback) == (0, {}) and losses.tolist() == [loss(p) for p in range(COUNT)]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "s").rglob("*")} == before


def test_readers_see_whole_blocks_while_a_writer_is_at_work(tmp_path):
    everything, batches = list(range(COUNT))[::-1], plan(range(COUNT))
    with StoredSketches(tmp_path / "s", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        first = SketchStore.open(tmp_path / "s")
        assert_holds(first, [])
        feed(store, most=3)  # six samples: a block of four, and two that wait
        early = SketchStore.open(tmp_path / "s")
        assert not early.complete and early.check(MODEL, SETTINGS, samples(COUNT), MAPS) == range(COUNT)
        g = gradients(COUNT)
        for batch in batches[3:]:
            for name in ("late", "norm", "weight"):
                store.observe(name, SketchedGradients(g[name][batch]), torch.tensor(batch))
            store.end_of_batch(batch, torch.tensor([loss(p) for p in batch], dtype=torch.float64), {})
            SketchStore.open(tmp_path / "s").sketches("weight")
        store.close()
        assert_holds(early, everything[:4])  # opened when there were four rows, read when there are eleven
        assert_holds(SketchStore.open(tmp_path / "s"), everything)


def test_an_interrupted_build_goes_on_where_its_last_block_ended(tmp_path):
    with StoredSketches(tmp_path / "s", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        feed(store, most=3)
    with StoredSketches(tmp_path / "s", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        done, losses, fallback = store.resume_point(plan(range(COUNT)))
        assert done == 2 and losses.tolist() == [loss(p) if p > 6 else 0.0 for p in range(COUNT)] and fallback == {}
        feed(store, most=2)
    with StoredSketches(tmp_path / "s", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        assert store.resume_point(plan(range(COUNT)))[0::2] == (4, {"late": "no rule for roll"})
        feed(store)
    assert_holds(SketchStore.open(tmp_path / "s"), list(range(COUNT))[::-1])


def test_a_pass_that_left_samples_out_is_not_complete(tmp_path):
    with StoredSketches(tmp_path / "s", MAPS, samples(COUNT), MODEL, SETTINGS) as store:
        feed(store, most=5)
        with pytest.raises(ValueError, match="10 of 11 samples"):
            store.close()
    assert not SketchStore.open(tmp_path / "s").complete


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("name", ["weight", "norm"])
def test_rows_that_are_not_finite_are_told_before_they_are_stored(tmp_path, name, value):
    spoilt = gradients(4)[name]
    spoilt[2].flatten()[:2] = value  # times a matrix, 3e38 overflows float32; exact, it is a finite row
    with StoredSketches(tmp_path / "s", MAPS, samples(4), MODEL, SETTINGS) as store:
        store.observe("late", SketchedGradients(gradients(4)["late"]), torch.arange(4))
        store.observe(name, SketchedGradients(spoilt), torch.arange(4))
        finite = bool((spoilt.flatten(1) @ MAPS[name].matrix).isfinite().all())
        assert store.first_not_finite([0, 1, 2, 3]) == (None if finite else (name, 2))
        assert store.first_not_finite([0, 1, 3]) is None
    assert SketchStore.open(tmp_path / "s").rows == 0


def test_a_folder_holds_a_store_or_not(tmp_path):
    assert not holds_store(tmp_path)
    build(tmp_path / "s", 2)
    assert holds_store(tmp_path / "s")


@pytest.mark.parametrize("given", [SETTINGS, ROUNDED])
def test_files_are_little_endian_rows(tmp_path, given):
    """The page's promise, byte by byte, without torch's reading."""
    build(tmp_path / "s", 5, given)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text(encoding="utf-8"))["record"]
    names = [tensor["name"] for tensor in manifest["tensors"]]
    raw = (tmp_path / "s" / "sketches" / f"{names.index('weight')}.bin").read_bytes()
    wanted = expected_rows("weight", [4, 3, 2, 1, 0], torch.float32)
    if given is ROUNDED:  # the upper half of a float32, to nearest even
        bits = wanted.numpy().view("<u4").astype(np.uint64)
        last = (bits >> np.uint64(16)) & np.uint64(1)
        assert raw == ((bits + np.uint64(0x7FFF) + last) >> np.uint64(16)).astype("<u2").tobytes()
    else:
        assert raw == wanted.numpy().astype("<f4").tobytes()
    norms = np.frombuffer((tmp_path / "s" / "squared_norms.bin").read_bytes(), "<f8").reshape(5, len(names))
    store = SketchStore.open(tmp_path / "s")
    assert all(np.array_equal(norms[:, i], store.q[name].numpy()) for i, name in enumerate(names))
