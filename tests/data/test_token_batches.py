"""Batches: every sample once within the budget, and three layouts that a model reads alike."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from fillm.data import Batch, Sample, SampleSet, collate, plan_batches
from fillm.errors import UsageError

LAYOUTS = ("right", "left", "packed")


def make(lengths: list[int], vocab: int = 50) -> SampleSet:
    samples = []
    for number, length in enumerate(lengths):
        tokens = tuple((7 * number + 3 * t * t + t) % vocab for t in range(length))
        labels = tuple(-100 if t < max(1, length // 2) else token for t, token in enumerate(tokens))
        samples.append(Sample(f"set#{number}", tokens, labels))
    return SampleSet(samples, "set")


@given(
    lengths=st.lists(st.integers(1, 40), max_size=40),
    budget=st.integers(1, 120),
    max_samples=st.none() | st.integers(1, 5),
    seed=st.none() | st.integers(0, 3),
)
def test_every_sample_once_within_the_budget(
    lengths: list[int], budget: int, max_samples: int | None, seed: int | None
) -> None:
    batches = plan_batches(lengths, budget, max_samples=max_samples, shuffle_seed=seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
        assert max_samples is None or len(batch) <= max_samples
    assert batches == plan_batches(lengths, budget, max_samples=max_samples, shuffle_seed=seed)
    if seed is None:
        flat = [index for batch in batches for index in batch]
        assert flat == sorted(flat, key=lambda index: (-lengths[index], index))
    by_length = sorted(
        ([lengths[index] for index in batch] for batch in batches), key=lambda batch: (min(batch), max(batch))
    )
    for shorter, longer in pairwise(by_length):
        assert max(shorter) <= min(longer)  # buckets: no batch mixes what another could have kept apart


def test_batches_are_full_longest_first_and_2048_tokens_by_default() -> None:
    assert plan_batches([10, 30, 20, 30, 500], 60) == [[4], [1, 3], [2, 0]]
    assert [len(batch) for batch in plan_batches([100] * 25)] == [20, 5]
    assert plan_batches([]) == []
    orders = {tuple(map(tuple, plan_batches([5] * 12, 20, shuffle_seed=seed))) for seed in range(5)}
    assert len(orders) == 5


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(UsageError, match="--tokens-per-batch 0: give at least 1"):
        plan_batches([1], 0)
    with pytest.raises(UsageError, match="at most 0 samples a batch"):
        plan_batches([1], max_samples=0)
    with pytest.raises(UsageError, match="sample 1 has no tokens"):
        plan_batches([1, 0])
    with pytest.raises(UsageError, match="choose one of right, left, packed"):
        collate(make([1]), [0], "middle")
    with pytest.raises(UsageError, match="at least one sample"):
        collate(make([1]), [])


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), layout=st.sampled_from(LAYOUTS), data=st.data())
def test_layout_laws(lengths: list[int], layout: str, data: st.DataObject) -> None:
    samples = make(lengths)
    indices = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, max_size=8))
    batch = collate(samples, indices, layout)
    count, chosen = len(indices), [samples[index] for index in indices]
    expected = (
        (1, sum(s.num_tokens for s in chosen)) if layout == "packed" else (count, max(s.num_tokens for s in chosen))
    )
    for tensor in (batch.input_ids, batch.labels, batch.attention_mask, batch.position_ids):
        assert tensor.shape == expected
        assert tensor.dtype == torch.int64
    assert batch.indices.tolist() == indices
    assert batch.lengths.tolist() == [sample.num_tokens for sample in chosen]
    assert batch.offsets.shape == (count + 1,)
    assert batch.offsets[0] == 0
    assert batch.offsets[-1] == batch.input_ids.numel()
    for row, sample in enumerate(chosen):
        slot = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        real = batch.attention_mask.flatten()[slot] == 1
        assert batch.input_ids.flatten()[slot][real].tolist() == list(sample.input_ids)
        assert batch.labels.flatten()[slot][real].tolist() == list(sample.labels)
        assert batch.position_ids.flatten()[slot][real].tolist() == list(range(sample.num_tokens))
        assert (batch.labels.flatten()[slot][~real] == -100).all()
        assert (batch.input_ids.flatten()[slot][~real] == sample.input_ids[-1]).all()
        if layout == "right":
            assert real.tolist() == sorted(real.tolist(), reverse=True)
        elif layout == "left":
            assert real.tolist() == sorted(real.tolist())
            assert (batch.position_ids.flatten()[slot][~real] == 0).all()
        else:
            assert real.all()


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate(make([3, 2]), [1, 0], "left")
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.layout == "left"
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert batch.input_ids.device.type == "cpu"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).double().eval()


def sample_losses(model: Any, batch: Batch) -> torch.Tensor:
    """[B] mean loss of each sample over its own counted tokens, read through offsets."""
    mask = None if batch.layout == "packed" else batch.attention_mask
    logits = model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    logits, labels = logits.flatten(0, 1), batch.labels.flatten()
    losses = []
    for begin, end in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        targets = labels[begin + 1 : end]
        losses.append(torch.nn.functional.cross_entropy(logits[begin : end - 1], targets, ignore_index=-100))
    return torch.stack(losses)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=5))
def test_a_sample_does_not_feel_its_batch_in_any_layout(model: Any, lengths: list[int]) -> None:
    samples, indices = make(lengths), list(range(len(lengths)))
    with torch.no_grad():
        alone = torch.cat([sample_losses(model, collate(samples, [index])) for index in indices])
        for layout in LAYOUTS:
            torch.testing.assert_close(sample_losses(model, collate(samples, indices, layout)), alone)
