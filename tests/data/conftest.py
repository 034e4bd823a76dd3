"""Fixtures of the data tests."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.byte_tokenizer import build_tokenizer


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def counted_text() -> Callable[[Any, Any], tuple[str, str]]:
    """(what does not count, what counts) of a sample, as text."""

    def split(sample: Any, tokenizer: Any) -> tuple[str, str]:
        pairs = list(zip(sample.input_ids, sample.labels, strict=True))
        prompt = [token for token, label in pairs if label == -100]
        return tokenizer.decode(prompt), tokenizer.decode([label for _, label in pairs if label != -100])

    return split
