"""A pass whose statistic keeps its own state: where it begins, what it hands over, what an interruption leaves."""

import signal

import pytest
import torch
from torch import nn

from fillm.errors import InterruptedRun, NumericsError, StoreError
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.runs import RunFolder
from fillm.statistics import SketchStore, StoredSketches, store_writer
from tests.statistics.store_feed import (
    MAPS,
    MODEL,
    SETTINGS,
    SketchedGradients,
    all_bytes,
    expected_rows,
    gradients,
    loss,
    samples,
)

COUNT = 11


class FedCapture:
    """Hands out gradients made to order; `stop_at` and `fail_at` count batches, `most` is what fits the memory."""

    def __init__(self, stop_at=None, most=COUNT, spoil=None):
        self.device, self.model, self.fallback = torch.device("cpu"), nn.Linear(1, 1), {}
        self.stop_at, self.most, self.spoil = stop_at, most, spoil
        self.batches = []

    def run(self, batch, given, observe):
        where = batch.indices
        g = gradients(len(given))
        if self.spoil is not None:
            g["weight"][self.spoil] = float("nan")
        observe("norm", SketchedGradients(g["norm"][where]), where)
        if len(where) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        observe("weight", SketchedGradients(g["weight"][where]), where)
        if 2 in where:
            self.fallback.setdefault("late", "no rule for roll")
        for position in where.tolist():
            observe("late", SketchedGradients(g["late"][[position]]), torch.tensor([position]))
        self.batches.append(where.tolist())
        if len(self.batches) == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        return torch.tensor([loss(position) for position in where.tolist()], dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(store_writer, "BLOCK_SAMPLES", 4)


def ranked(path, capture, count=COUNT, budget=6, out=None):
    """One pass of the retain set into a store, as a ranking would have it; returns the passes."""
    with StoredSketches(path / "store", MAPS, samples(count), MODEL, SETTINGS) as store:
        folder = None if out is None else RunFolder(path / out, overwrite=False, resume=True)
        passes = Passes(Console.silent(), tokens_per_batch=budget, folder=folder, checkpoint_seconds=0.0)
        try:
            with passes.stopping():
                passes.run("retain", "retain pass", capture, samples(count), store, positions=store.positions)
        finally:
            if folder is not None:
                folder.close()
    return passes


def assert_whole(path, count=COUNT):
    store = SketchStore.open(path / "store")
    assert store.complete and sorted(store.positions.tolist()) == list(range(count))
    for name in MAPS:
        assert torch.equal(store.sketches(name), expected_rows(name, store.positions.tolist(), torch.float32))
    return store


def test_a_pass_fills_a_store_and_knows_every_loss(tmp_path):
    passes = ranked(tmp_path, FedCapture())
    store = assert_whole(tmp_path)
    assert passes.losses["retain"].tolist() == [loss(p) for p in range(COUNT)]
    assert store.losses.tolist() == [loss(p) for p in store.positions.tolist()]
    assert passes.record[0]["samples"] == COUNT


@pytest.mark.parametrize("stop_at", range(1, 7))
def test_a_stopped_pass_goes_on_and_ends_with_the_same_bytes(tmp_path, stop_at):
    capture = FedCapture()
    ranked(tmp_path / "whole", capture)
    with pytest.raises(InterruptedRun, match="stopped by SIGTERM in the retain pass"):
        ranked(tmp_path, FedCapture(stop_at), out="run")
    # The store is all that a stopped pass leaves: the run's own folder has no state of it.
    assert not (tmp_path / "run.partial").exists()
    further = FedCapture()
    passes = ranked(tmp_path, further, out="run")
    stored = sum(len(batch) for batch in capture.batches[:stop_at]) // 4 > 0
    assert stored == (len(further.batches) < len(capture.batches))
    assert further.batches == capture.batches[len(capture.batches) - len(further.batches) :]
    assert passes.losses["retain"].tolist() == [loss(p) for p in range(COUNT)]
    assert all_bytes(tmp_path / "store") == all_bytes(tmp_path / "whole" / "store")


def test_what_was_met_before_goes_on_as_it_began(tmp_path):
    first = FedCapture(stop_at=6)
    with pytest.raises(InterruptedRun):
        ranked(tmp_path, first, out="run")
    assert any(2 in batch for batch in first.batches)
    again = FedCapture()
    assert SketchStore.open(tmp_path / "store").fallback == {"late": "no rule for roll"}
    ranked(tmp_path, again, out="run")
    assert not any(2 in batch for batch in again.batches) and again.fallback == {"late": "no rule for roll"}


def test_a_pass_with_other_batches_is_refused(tmp_path):
    with pytest.raises(InterruptedRun):
        ranked(tmp_path, FedCapture(stop_at=5), out="run")
    with pytest.raises(StoreError, match="--tokens-per-batch"):
        ranked(tmp_path, FedCapture(), budget=4)
    ranked(tmp_path, FedCapture())
    assert_whole(tmp_path)


def test_later_samples_are_added_by_a_pass_over_them_alone(tmp_path):
    ranked(tmp_path, FedCapture(), count=6)
    capture = FedCapture()
    passes = ranked(tmp_path, capture)
    assert sorted(p for batch in capture.batches for p in batch) == [6, 7, 8, 9, 10]
    assert passes.losses["retain"].tolist() == [loss(p) for p in range(COUNT)]
    assert_whole(tmp_path)


def test_a_whole_store_needs_no_batch(tmp_path):
    ranked(tmp_path, FedCapture())
    capture = FedCapture()
    passes = ranked(tmp_path, capture)
    assert capture.batches == [] and passes.losses["retain"].tolist() == [loss(p) for p in range(COUNT)]


def test_batches_that_are_halved_give_the_same_bytes(tmp_path):
    ranked(tmp_path / "whole", FedCapture(), budget=16)
    halved = FedCapture(most=1)
    ranked(tmp_path, halved, budget=16)
    assert all(len(batch) == 1 for batch in halved.batches)
    assert all_bytes(tmp_path / "store") == all_bytes(tmp_path / "whole" / "store")


def test_a_gradient_that_is_not_finite_is_named_and_the_blocks_before_it_stay(tmp_path):
    with pytest.raises(NumericsError, match="feed#4 with respect to weight is not finite"):
        ranked(tmp_path, FedCapture(spoil=4))
    store = SketchStore.open(tmp_path / "store")
    assert store.rows > 0 and 4 not in store.positions.tolist() and bool(store.sketches("weight").isfinite().all())
    ranked(tmp_path, FedCapture())
    assert_whole(tmp_path)
