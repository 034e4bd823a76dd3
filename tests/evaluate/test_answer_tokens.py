"""Against a restatement that takes one row at a time, in float64, and one token at a time."""

import math

import numpy as np
import pytest
import torch

from fillm.data import Sample, SampleSet
from fillm.errors import NumericsError, OutOfMemoryError
from fillm.evaluate.answer_tokens import AnswerTokens, token_pass
from tests.families import VOCAB_SIZE, build_family

LENGTHS = [(1, 1), (5, 3), (30, 40), (2, 17), (9, 1), (64, 63), (3, 8)]


def samples_of(lengths: list[tuple[int, int]]) -> SampleSet:
    """Samples of random tokens: (prompt, answer) lengths."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for number, (prompt, answer) in enumerate(lengths):
        ids = torch.randint(3, VOCAB_SIZE, (prompt + answer,), generator=draw).tolist()
        made.append(Sample(f"s{number}", tuple(ids), (*[-100] * prompt, *ids[prompt:])))
    return SampleSet(made, "made up")


def restated(model: torch.nn.Module, sample: Sample) -> list[tuple[int, float, int, float, float]]:
    """Token, log p, argmax, mean and deviation of log p under p, by plain sums."""
    rows = []
    for place, label in enumerate(sample.labels):
        if label == -100:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids[:place]])).logits[0, -1].tolist()
        top = max(logits)
        total = math.log(math.fsum(math.exp(z - top) for z in logits)) + top
        log_p = [z - total for z in logits]
        mean = math.fsum(math.exp(q) * q for q in log_p)
        variance = math.fsum(math.exp(q) * (q - mean) ** 2 for q in log_p)
        rows.append((label, log_p[label], logits.index(top), mean, math.sqrt(variance)))
    return rows


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_token_as_one_row_in_float64_gives_it(family: str) -> None:
    model, samples = build_family(family).double(), samples_of(LENGTHS)  # its norms stay in float32
    found = token_pass(model, samples, tokens_per_batch=200, vocabulary_moments=True)
    for sample, one in zip(samples, found, strict=True):
        token, log_p, predicted, mean, deviation = map(np.array, zip(*restated(model, sample), strict=True))
        assert (one.token_ids == token).all() and (one.predicted == predicted).all()
        np.testing.assert_allclose(one.log_probs, log_p, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.mean_log_probs, mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.std_log_probs, deviation, rtol=0, atol=1e-6)
        assert one.loss == pytest.approx(-log_p.mean(), abs=1e-6)
        kinds = [one.token_ids.dtype, one.log_probs.dtype, one.predicted.dtype, one.std_log_probs.dtype]
        assert kinds == [np.int64, np.float64, np.int64, np.float64]


def test_batches_of_one_and_of_many_agree() -> None:
    model, samples = build_family("llama"), samples_of(LENGTHS)
    alone = token_pass(model, samples, tokens_per_batch=1)
    for many in (
        token_pass(model, samples, tokens_per_batch=10_000),
        token_pass(model, samples, tokens_per_batch=None, batch_size=2),
    ):
        for one, other in zip(alone, many, strict=True):
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
            assert (one.predicted == other.predicted).all() and other.mean_log_probs is None


def test_the_model_comes_back_as_it_was() -> None:
    model, samples = build_family("llama").train().requires_grad_(True), samples_of(LENGTHS[:3])
    before = [p.clone() for p in model.parameters()]
    first = token_pass(model, samples, tokens_per_batch=None)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    again = token_pass(model, samples, tokens_per_batch=None)
    assert all((a.log_probs == b.log_probs).all() for a, b in zip(first, again, strict=True))


def test_moments_hold_where_the_model_is_certain() -> None:
    model = build_family("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    (one,) = token_pass(model, samples_of([(3, 5)]), tokens_per_batch=None, vocabulary_moments=True)
    assert np.isfinite(one.mean_log_probs).all() and np.isfinite(one.std_log_probs).all()
    assert abs(one.mean_log_probs).max() < 1e-3


def test_a_model_that_is_broken_is_named_with_the_sample() -> None:
    model = build_family("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match="sample s.*lm_head.weight holds NaN"):
        token_pass(model, samples_of(LENGTHS[:2]), tokens_per_batch=None)


class Counted:
    """A bar."""

    def __init__(self) -> None:
        self.samples = self.tokens = 0

    def advance(self, samples: int, tokens: int, loss: float | None = None) -> None:
        self.samples += samples
        self.tokens += tokens


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = build_family("llama"), samples_of(LENGTHS)
    whole, bar, lines = token_pass(model, samples, tokens_per_batch=10_000), Counted(), []
    plain = model.forward

    def small(*args: object, **kwargs: object) -> object:
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    halved = token_pass(model, samples, tokens_per_batch=10_000, progress=bar, notice=lines.append)
    assert [one.log_probs.shape for one in halved] == [one.log_probs.shape for one in whole]
    assert all(np.allclose(a.log_probs, b.log_probs, atol=1e-5) for a, b in zip(whole, halved, strict=True))
    assert (bar.samples, bar.tokens) == (len(samples), samples.num_tokens)
    assert lines == [f"out of memory: batches are halved to at most {n} sample(s)" for n in (3, 1)]


def test_out_of_memory_with_one_sample_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("llama")

    def none(*args: object, **kwargs: object) -> object:
        raise MemoryError

    monkeypatch.setattr(model, "forward", none)
    with pytest.raises(OutOfMemoryError, match="one sample of 8 tokens; give --max-length below 8"):
        token_pass(model, samples_of([(5, 3)]), tokens_per_batch=None)


def test_another_fault_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("llama")

    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError("a fault")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        token_pass(model, samples_of([(5, 3)]), tokens_per_batch=None)


def test_loss_by_hand() -> None:
    ids = np.zeros(4, dtype=np.int64)
    assert AnswerTokens(ids, np.log([0.5, 0.25, 1.0, 0.125]), ids).loss == pytest.approx(1.5 * math.log(2))


def test_an_exported_name_stays_the_function_once_its_module_is_loaded():
    import fillm.evaluate
    import fillm.evaluate.answer_tokens as module

    assert fillm.evaluate.token_pass is module.token_pass
