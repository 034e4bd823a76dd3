"""Token statistics made by hand, and samples and logits of a tiny model to check them against."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fillm.data import Sample, SampleSet
from fillm.evaluate.answer_tokens import AnswerTokens


def answer(right: Sequence[bool], log_probs: Sequence[float] | None = None, last: int = 5) -> AnswerTokens:
    """An answer whose tokens the model ranks first where `right` says so; it ends in token `last`."""
    ids = np.arange(10, 10 + len(right))
    ids[-1] = last
    given = np.zeros(len(right)) if log_probs is None else np.array(log_probs, np.float64)
    return AnswerTokens(ids, given, np.where(right, ids, ids + 1))


def likely(
    *log_probs: float, means: Sequence[float] | None = None, stds: Sequence[float] | None = None
) -> AnswerTokens:
    """An answer of which only the probabilities matter."""
    moments = (None if some is None else np.array(some, np.float64) for some in (means, stds))
    ids = np.arange(len(log_probs))
    return AnswerTokens(ids, np.array(log_probs, np.float64), ids, *moments)


def random_samples(count: int, seed: int, vocabulary: int = 97, source: str = "made up") -> SampleSet:
    """Questions and answers of random tokens, of unequal lengths; the shortest answer is one token."""
    draw = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        ids = draw.integers(3, vocabulary, 4 + number % 5 + number % 3 * 3)
        prompt = 3 + number % 3
        labels = [-100] * prompt + ids[prompt:].tolist()
        samples.append(Sample(f"{source}#{number}", tuple(ids.tolist()), tuple(labels)))
    return SampleSet(samples, source)


def slow_log_probs(model: nn.Module, sample: Sample) -> list[np.ndarray]:
    """For every answer token, the log-probabilities of the whole vocabulary; row by row, without a batch."""
    with torch.no_grad():
        logits = model(torch.tensor([sample.input_ids])).logits[0].double().numpy()
    out = []
    for place, label in enumerate(sample.labels):
        if label != -100:
            z = logits[place - 1]
            out.append(z - z.max() - np.log(np.exp(z - z.max()).sum()))
    return out
