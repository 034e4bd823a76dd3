"""Against the plainest loop there is: one prompt, no cache, the likeliest token again and again."""

import random
import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from fillm.errors import DataError, NumericsError, OutOfMemoryError, UsageError
from fillm.evaluate import generate
from fillm.evaluate.generate import greedy_answers
from tests.families import MAX_POSITIONS, build_family
from tests.rank.conftest import word_tokenizer

EOS = 2


def sharp(family: str) -> Any:
    """An untrained model whose answers differ from prompt to prompt and in length."""
    model = build_family(family)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    return model


def prompts_of(count: int, longest: int = 30) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(4, 80) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def restated(model: Any, prompt: list[int], limit: int) -> str:
    ids = list(prompt)
    while len(ids) < min(len(prompt) + limit, MAX_POSITIONS):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == EOS:
            break
        ids.append(token)
    return word_tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
def test_answers_are_those_of_the_plain_loop(family: str) -> None:
    model, prompts = sharp(family), prompts_of(4)
    answers = greedy_answers(model, word_tokenizer(), prompts, max_new_tokens=70, batch_size=32)
    assert answers == [restated(model, prompt, 70) for prompt in prompts]
    assert len({len(answer.split()) for answer in answers}) > 1


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "gemma2"])
def test_the_batch_size_changes_no_answer(family: str) -> None:
    model, prompts, tokenizer = sharp(family), prompts_of(9), word_tokenizer()
    alone = greedy_answers(model, tokenizer, prompts, max_new_tokens=66, batch_size=1)
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=66, batch_size=32) == alone
    turned = greedy_answers(model, tokenizer, prompts[::-1], max_new_tokens=66, batch_size=4)
    assert turned[::-1] == alone


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_computes_no_numbers_has_no_answers(value: float) -> None:
    model, prompts = sharp("llama"), [[4, 5], [6, 7, 8], [9]]
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = value
    with pytest.raises(NumericsError, match="^a logit of prompt 2 is not a number: model.embed_tokens.weight holds"):
        greedy_answers(model, word_tokenizer(), prompts, max_new_tokens=3, batch_size=4)


def test_rows_that_go_on_are_gathered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, tokenizer = sharp("llama"), prompts_of(9), word_tokenizer()
    whole = greedy_answers(model, tokenizer, prompts, max_new_tokens=50, batch_size=32)
    seen: list[tuple[int, int]] = []
    plain = generate._continued

    def watched(model: Any, texts: Any, steps: int, *rest: Any) -> Any:
        seen.append((len(texts), steps))
        return plain(model, texts, steps, *rest)

    monkeypatch.setattr(generate, "_FIRST_TOKENS", 3)
    monkeypatch.setattr(generate, "_continued", watched)
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=50, batch_size=32) == whole
    assert [steps for _, steps in seen] == [3, 9, 36, 2] and seen[0][0] == 9
    assert [count for count, _ in seen] == sorted((count for count, _ in seen), reverse=True)
    assert seen[-1][0] < 9


def test_an_answer_ends_with_the_models_positions_or_its_limit() -> None:
    model, tokenizer = sharp("gpt2"), word_tokenizer()
    prompts = [*prompts_of(3), [5] * (MAX_POSITIONS - 2)]
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=100, batch_size=8)
    assert answers == [restated(model, prompt, 100) for prompt in prompts]
    assert len(answers[-1].split()) <= 2
    short = greedy_answers(model, tokenizer, prompts[:1], max_new_tokens=1, batch_size=8)
    assert short == [restated(model, prompts[0], 1)]


def test_settings_saved_with_the_model_are_set_aside_and_kept() -> None:
    model, prompts, tokenizer = sharp("llama"), prompts_of(5), word_tokenizer()
    plain = greedy_answers(model, tokenizer, prompts, max_new_tokens=20, batch_size=5)
    own = GenerationConfig(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0, eos_token_id=EOS)
    model.generation_config = own
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy_answers(model, tokenizer, prompts, max_new_tokens=20, batch_size=5) == plain
    assert model.generation_config is own and model.training


def test_a_further_end_token_of_the_model_ends_an_answer() -> None:
    model, prompts, tokenizer = sharp("llama"), prompts_of(5), word_tokenizer()
    plain = greedy_answers(model, tokenizer, prompts, max_new_tokens=40, batch_size=5)
    word = plain[0].split()[3]
    model.generation_config = GenerationConfig(eos_token_id=[EOS, tokenizer.convert_tokens_to_ids(word)])
    cut = greedy_answers(model, tokenizer, prompts, max_new_tokens=40, batch_size=5)
    expected = []
    for answer in plain:
        words = answer.split()
        expected.append(" ".join(words[: words.index(word)] if word in words else words))
    assert cut == expected


def test_no_prompts_no_answers() -> None:
    assert greedy_answers(sharp("llama"), word_tokenizer(), [], batch_size=2) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        ([[5], []], {}, DataError, "prompt 2 has no tokens"),
        ([[5] * MAX_POSITIONS], {}, DataError, f"{MAX_POSITIONS} tokens, the model has {MAX_POSITIONS} positions"),
        ([[5]], {"batch_size": 0}, UsageError, "--batch-size 0: give at least 1"),
        ([[5]], {"max_new_tokens": 0}, UsageError, "--max-new-tokens 0: give at least 1"),
    ],
)
def test_what_cannot_be_answered(prompts: Any, settings: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        greedy_answers(sharp("llama"), word_tokenizer(), prompts, **{"batch_size": 4, **settings})


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, tokenizer, lines = sharp("llama"), prompts_of(6), word_tokenizer(), []
    whole = greedy_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=6)
    plain, fits = model.generate, 2

    def small(**given: Any) -> Any:
        if given["input_ids"].shape[0] > fits:
            raise torch.OutOfMemoryError("out of memory")
        return plain(**given)

    monkeypatch.setattr(model, "generate", small)
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=6, notice=lines.append) == whole
    assert len(lines) == 2
    fits = 0
    with pytest.raises(OutOfMemoryError, match="one sample"):
        greedy_answers(model, tokenizer, prompts, max_new_tokens=10, batch_size=6)
