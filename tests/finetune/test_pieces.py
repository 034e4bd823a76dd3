"""The pieces of a training: tokenizer, architectures, order, rates, losses."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fillm.data import load_rows, tokenize_rows
from fillm.errors import DataError, ModelError, UsageError
from fillm.finetune.architectures import architecture_config, new_model, train_tokenizer, training_texts
from fillm.finetune.config import FinetuneConfig, resolved
from fillm.finetune.schedule import epoch_batches, rate_factor, warmup_steps
from fillm.finetune.training import sample_losses
from fillm.models import load_tokenizer
from tests.families import build_family

TEXTS = ["Question: who wrote it?\nAnswer: Jaime Vasquez wrote it.", "a cold river, a cold winter"]


def test_tokenizer_gives_every_text_back():
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in [*TEXTS, " žluťoučký  kůň\n\t🐎", "<bos> is text here? no"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < len(tokenizer) <= 300


def test_tokenizer_begins_with_bos_and_survives_saving(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert ids[0] == tokenizer.bos_token_id == again.bos_token_id
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len({again.eos_token_id, again.pad_token_id, again.bos_token_id}) == 3


def test_tokenizer_training_is_deterministic():
    once, again = (train_tokenizer(TEXTS, 290).backend_tokenizer.to_str() for _ in range(2))
    assert once == again


def test_tokenizer_needs_room_for_the_bytes():
    with pytest.raises(UsageError, match="--vocab-size 258: give at least 259"):
        train_tokenizer(TEXTS, 258)
    assert len(train_tokenizer(TEXTS, 259)) == 259


def test_training_texts_are_what_the_model_meets():
    rows = load_rows([{"question": "Q?", "answer": "A."}, {"text": "alone"}, {"text": "x", "labels": "y"}])
    assert training_texts(rows, "Q: {question}\nA: {answer}") == ["Q: Q?\nA: A.", "alone", "Q: x\nA: y"]
    assert training_texts(rows, "chat") == ["Q? A.", "alone", "x y"]
    with pytest.raises(DataError, match="no row has text"):
        training_texts(load_rows([{"input_ids": [1, 2], "labels": [-100, 2]}]), "chat")


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 1.0e6, 1.4e6), ("small", 5.0e6, 5.4e6)])
def test_built_in_architectures_have_their_size(name, low, high):
    config = architecture_config(name)
    hidden, vocabulary, inner = config.hidden_size, config.vocab_size, config.intermediate_size
    expected = 2 * vocabulary * hidden + 4 * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden

    class Size:
        pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

        def __len__(self):
            return vocabulary

    model = new_model(config, Size(), seed=0)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert low < expected < high
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_architecture_from_a_file(tmp_path):
    build_family("gpt2").config.save_pretrained(tmp_path)
    for where in (tmp_path, tmp_path / "config.json"):
        assert architecture_config(str(where)).model_type == "gpt2"


def test_architecture_mistakes(tmp_path):
    with pytest.raises(UsageError, match="neither tiny nor small"):
        architecture_config("huge")
    path = tmp_path / "config.json"
    for text in ("{", json.dumps({"model_type": "nobody_knows"}), json.dumps({"model_type": "t5"})):
        path.write_text(text)
        with pytest.raises(ModelError, match="--architecture"):
            architecture_config(str(path))


def test_new_model_is_a_function_of_the_seed_and_leaves_the_random_state_alone():
    tokenizer = train_tokenizer(TEXTS, 300)
    before = torch.get_rng_state()
    first, same, other = (new_model(build_family("llama").config, tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape[0] == len(tokenizer)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_sees_every_sample_once(lengths, size, seed, epoch):
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / size)
    assert all(len(batch) <= size for batch in batches)
    assert batches == epoch_batches(lengths, size, seed, epoch)


def test_epochs_differ_and_batches_hold_similar_lengths():
    lengths = [5 + (i * 37) % 60 for i in range(400)]
    first, second = epoch_batches(lengths, 8, 0, 0), epoch_batches(lengths, 8, 0, 1)
    assert {tuple(sorted(b)) for b in first}.isdisjoint({tuple(sorted(b)) for b in second})
    padded = sum(len(b) * max(lengths[i] for i in b) for b in first)
    in_order = sum(8 * max(lengths[i : i + 8]) for i in range(0, 400, 8))
    assert padded < 1.15 * sum(lengths) < in_order


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rates_rise_then_fall(schedule):
    total, warmup = 50, 10
    rates = [rate_factor(step, total, warmup, schedule) for step in range(total)]
    assert rates[:warmup] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert rates[warmup] == 1.0
    assert all(a > b > 0 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    middle = warmup + (total - warmup) // 2
    assert rates[middle] == pytest.approx(0.5)
    quarter = 1 - 0.25 if schedule == "linear" else math.cos(math.pi / 8) ** 2
    assert rates[warmup + 10] == pytest.approx(quarter)


def test_warmup_steps():
    assert warmup_steps(0.1, 200) == 20
    assert warmup_steps(7, 200) == 7
    assert warmup_steps(199, 200) == 199
    assert warmup_steps(0.9999, 200) == 199
    assert warmup_steps(0.5, 1) == 0


@pytest.mark.parametrize(("warmup", "total"), [(200, 200), (500, 200), (99.6, 100), (1, 1)])
def test_a_warmup_that_the_run_would_not_get_beyond_is_refused(warmup, total):
    with pytest.raises(UsageError, match=f"^--warmup {warmup:g}: the run has no more than {total} steps; give fewer"):
        warmup_steps(warmup, total)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_sample_losses_are_those_of_each_sample_alone(family):
    rows = [
        {"input_ids": list(range(3, 3 + n)), "labels": [-100] * (n // 2) + list(range(3 + n // 2, 3 + n))}
        for n in (4, 19, 9)
    ]
    samples = tokenize_rows(load_rows(rows), None)
    model = build_family(family, dtype=torch.float64)
    losses = sample_losses(model, samples, [2, 0, 1], torch.device("cpu"))
    for position, index in enumerate([2, 0, 1]):
        ids = torch.tensor([samples[index].input_ids])
        labels = torch.tensor(samples[index].labels[1:])
        reference = F.cross_entropy(model(input_ids=ids).logits[0, :-1], labels, ignore_index=-100)
        assert losses[position].item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"out": None}, "--out"),
        ({"data": None}, "--data"),
        ({"model": "m"}, "either --architecture"),
        ({"architecture": None}, "either --architecture"),
        ({"architecture": None, "model": "m", "vocab_size": 300}, "--vocab-size belongs"),
        ({"tokenizer": "t", "vocab_size": 300}, "--vocab-size and --tokenizer"),
        ({"epochs": 1, "max_steps": 1}, "--epochs and --max-steps"),
        ({"epochs": 0}, "--epochs 0"),
        ({"lr": -1.0}, "--lr -1.0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"warmup": -0.1}, "--warmup -0.1"),
        ({"lora_rank": 0}, "--lora-rank 0"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(UsageError) as caught:
        resolved(FinetuneConfig(**{"architecture": "tiny", "data": "d", "out": "o", **settings}))
    assert said in str(caught.value)


def test_defaults_follow_what_is_trained():
    new = resolved(FinetuneConfig(architecture="tiny", data="d", out="o"))
    given_model = resolved(FinetuneConfig(model="m", data="d", out="o"))
    lora = resolved(FinetuneConfig(model="m", data="d", out="o", lora_rank=4, max_steps=9))
    assert (new.epochs, new.lr) == (30, 3e-3)
    assert (given_model.epochs, given_model.lr) == (5, 1e-5)
    assert (lora.epochs, lora.lr) == (None, 2e-4)


@pytest.mark.parametrize("name", ["lr", "target_loss", "weight_decay", "warmup"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_rates_and_losses_are_finite_numbers_of_the_right_sign(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=rf"^{flag} (nan|inf|-1\.0): has to be"):
        resolved(FinetuneConfig(architecture="tiny", data="rows.jsonl", out="out", **{name: value}))
