"""Sets on which a ranking goes wrong easily: many rows, parallel gradients, one row, one position to attend to."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig

from fillm import rank_parameters
from fillm.capture import Capture, noise, verify
from fillm.capture.rules import rounded_to_zero
from fillm.data import Sample, SampleSet, collate
from tests.capture.reference import reference_gradients, toy_samples
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, Direct, family, rows_of


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tolerance", [pytest.param(1e-3, marks=pytest.mark.slow), 0.05])
def test_many_rows_give_the_same_scores_however_they_are_batched(name, tolerance):
    """Enough rows that brackets certify: which sums are kept must not depend on where batches end."""
    model, _ = family(name)
    rows = rows_of(toy_samples(48, seed=3))
    expected = rank_parameters(model, None, FORGET_ROWS, rows, tolerance=tolerance)
    exact = {row["name"] for row in expected if row["score_low"] == row["score_high"]}
    assert len(exact) < len(expected.scores) or tolerance == 1e-3  # the brackets do decide something
    for settings in ({"tokens_per_batch": 1}, {"tokens_per_batch": 40}, {"layout": "left", "tokens_per_batch": 64}):
        found = rank_parameters(model, None, FORGET_ROWS, rows, tolerance=tolerance, **settings)
        assert {row["name"] for row in found if row["score_low"] == row["score_high"]} == exact
        for tensor, score in found.scores.items():
            assert score == pytest.approx(expected.scores[tensor], rel=1e-5), (tensor, settings)


@pytest.mark.parametrize("copies", [1, 3])
def test_parallel_gradients_keep_the_exact_value_inside_an_honest_bracket(copies):
    """With the forget row alone as retain set, v and w cancel to lambda / q of their size, below float32."""
    model = build_family("llama")
    samples = toy_samples(1, seed=5)
    rows = rows_of(samples)
    g = reference_gradients(model, samples)
    direct = Direct(g, g * copies)
    ranking = rank_parameters(model, None, rows, rows * copies)
    bracketed = 0
    for row in ranking:
        exact = float(direct.u[row["name"]].norm())
        if "unused" in row["note"]:
            continue
        slack = 1e-3 if row["score_low"] == row["score_high"] else 1e-6
        assert row["score_low"] * (1 - slack) <= exact <= row["score_high"] * (1 + slack), row["name"]
        if row["score_low"] < row["score_high"]:
            bracketed += 1
            assert "parallel" in row["note"] or row["score_high"] / row["score_low"] < 1.001
    assert bracketed


def test_queries_that_see_one_token_are_unused_not_first():
    """One input position: attention has nothing to choose from, and q and k no gradient but rounding noise."""
    model = build_family("llama")
    rows = [{"input_ids": [token, token + 1], "labels": [-100, token + 1]} for token in range(3, 9)]
    ranking = rank_parameters(model, None, rows[:2], rows[2:])
    for row in ranking:
        queries = ".q_proj." in row["name"] or ".k_proj." in row["name"]
        assert ("unused" in row["note"]) == queries, row
    assert not any("autograd" in row["note"] for row in ranking)


def wide_llama(scale=0.1):
    """Wide enough that what attention leaves of a single position is not zero to the bit."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=90, num_key_value_heads=1, initializer_range=scale, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("scale", [0.02, 0.1, 0.3])
def test_noise_that_backpropagation_leaves_is_no_gradient(scale):
    """Seen by float64: rules and autograd differ by all of it, and neither is right."""
    model = wide_llama(scale)
    rows = [{"input_ids": [token, token + 1], "labels": [-100, token + 1]} for token in range(3, 30)]
    forget, retain = rows[:9], rows[9:]
    ranking = rank_parameters(model, None, forget, retain)
    for row in ranking:
        queries = ".q_proj." in row["name"] or ".k_proj." in row["name"]
        assert row["note"] == ("unused" if queries else ""), row
        assert (row["score"] == 0.0) == queries, row
    assert not ranking.record["fallback"] and ranking.record["one_by_one"] is None
    assert all(".q_proj." in name or ".k_proj." in name for name in ranking.record["rounding_noise"])


def nothing_to_choose(model):
    """Samples whose queries have nothing to choose, and a capture that has seen what rounding leaves of that.

    Which cancel to the bit, two tokens or one token again and again, is up to the processor's attention kernel.
    """
    repeated = [(3 + 7 * index,) * 5 for index in range(8)]
    again = [Sample(f"again#{index}", ids, (-100, *ids[1:])) for index, ids in enumerate(repeated)]
    for samples in (toy_samples(8, vocab=90, shortest=2, longest=2), SampleSet(again, "again")):
        capture = Capture(model, [name for name, _ in model.named_parameters()])
        verify(capture, samples)
        if capture.noise:
            break
    return samples, capture


def test_sample_that_stands_out_of_the_noise_is_exact():
    """The checked samples leave queries nothing to choose; one that comes later, longer, does, and is not left out."""
    model = wide_llama()
    idle, capture = nothing_to_choose(model)
    long = toy_samples(1, vocab=90, seed=2, shortest=12, longest=12)
    retain = SampleSet([*idle[2:], *long], "retain")
    queries = {name for name in capture.parameters if ".q_proj." in name or ".k_proj." in name}
    assert set(capture.noise) == queries
    references, seen = reference_gradients(model, retain), {}

    def observe(name, gradients, positions):
        for row, position in enumerate(positions.tolist()):
            assert (name, position) not in seen
            seen[name, position] = gradients.materialise(row).double()

    capture.run(collate(retain, range(len(retain))), retain, observe)
    last = len(retain) - 1
    assert {position for name, position in seen if name in queries} == {last}
    for name in queries:
        exact = references[last][name]
        assert float((seen[name, last] - exact).norm()) <= 1e-5 * float(exact.norm()), name


@pytest.mark.parametrize("copies", [noise.MOST_PARAMETERS, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_gradients_are_not_taken_for_noise(monkeypatch, dtype, copies):
    """A branch scaled down to a millionth has gradients as small as noise, and they are right."""
    monkeypatch.setattr(noise, "MOST_PARAMETERS", copies)
    found, real = [], noise.suspects
    monkeypatch.setattr(noise, "suspects", lambda *given: found.extend(real(*given)) or real(*given))
    model = wide_llama().to(dtype)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-6)
    samples = toy_samples(4, vocab=90)
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    verify(capture, samples)
    assert found and not capture.noise and not capture.fallback


def test_models_too_large_for_a_copy_go_by_what_two_ways_agree_on(monkeypatch):
    monkeypatch.setattr(noise, "MOST_PARAMETERS", 0)
    model = wide_llama(0.3)
    rows = [{"input_ids": [token, token + 1], "labels": [-100, token + 1]} for token in range(3, 30)]
    ranking = rank_parameters(model, None, rows[:9], rows[9:])
    unused = {row["name"] for row in ranking if row["note"] == "unused"}
    assert unused == {name for name in ranking.names if ".q_proj." in name or ".k_proj." in name}


def test_key_rows_of_a_fused_bias_are_no_ones_choice():
    model = build_family("gpt2")
    ranking = rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, granularity="row", objective="retain")
    width = model.config.n_embd
    keys = [row for row in ranking if row["name"].endswith("c_attn.bias") and width <= row["index"] < 2 * width]
    assert len(keys) == width * model.config.n_layer
    assert all("unused" in row["note"] for row in keys)
    assert min(row["rank"] for row in keys) > len(ranking.scores) - len(keys) - 200


@pytest.mark.parametrize(("roundings", "kept"), [(0, False), (222, False), (1000, True), (1e6, True)])
def test_an_entry_of_a_fused_bias_is_noise_up_to_some_hundred_roundings(roundings, kept):
    """Of a small GPT-2, forget Fisher over retain Fisher of such noise came out infinite and first."""
    unit = torch.finfo(torch.float32).eps
    summed = torch.tensor([[1.0, roundings * unit], [-2.0, -2 * roundings * unit]])
    squares = torch.tensor([[1.0, 1.0], [4.0, 4.0]])
    found = rounded_to_zero(summed, squares, torch.float32)
    assert torch.equal(found, summed if kept else summed * torch.tensor([1.0, 0.0]))


def test_one_retain_row_still_shows_a_model_that_mixes_its_batch():
    model = build_family("llama")

    def mixing(module, args, output):
        return output - 0.5 * output.mean(0, keepdim=True)

    handle = model.model.layers[0].mlp.register_forward_hook(mixing)
    try:
        ranking = rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS[:1])
    finally:
        handle.remove()
    assert all("batches of one" in row["note"] for row in ranking)
    assert ranking.record["one_by_one"].startswith("sample ") and not ranking.record["fallback"]


def sees_what_comes_after():
    """A model whose tokens see what comes after them, padding included."""
    torch.manual_seed(3)
    config = BertConfig(vocab_size=90, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("equal", ["forget", "retain"])
def test_padding_of_the_smaller_set_alone_is_noticed(equal):
    """A larger set that has no padding says nothing of what padding does to the other."""
    model = sees_what_comes_after()
    ragged, even = toy_samples(3, seed=4), toy_samples(5, seed=5, shortest=9, longest=9)
    forget, retain = (even, ragged) if equal == "forget" else (ragged, even)
    ranking = rank_parameters(model, None, rows_of(forget), rows_of(retain), save_update=True)
    expected = Direct(reference_gradients(model, forget), reference_gradients(model, retain))
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.value.weight"):
        assert ranking.scores[name] == pytest.approx(float(expected.u[name].norm()), rel=1e-4), name


@pytest.mark.parametrize("update", [False, True])
def test_samples_run_one_by_one_leave_no_rounding_noise(update):
    """Keys have no gradient of their bias: through the rules it is zero, and not noise that ranks first."""
    model = sees_what_comes_after()
    forget, retain = toy_samples(3, seed=4), toy_samples(6, seed=5)
    ranking = rank_parameters(model, None, rows_of(forget), rows_of(retain), save_update=update)
    direct = Direct(reference_gradients(model, forget), reference_gradients(model, retain))
    for row in ranking:
        assert row["note"].endswith("batches of one")
        # Pooler and relation head are not reached; the key bias cancels.
        assert row["name"].endswith("key.bias") == row["note"].startswith("unused"), row
        if not row["name"].endswith("key.bias"):
            assert row["score"] == pytest.approx(float(direct.u[row["name"]].norm()), rel=1e-3), row["name"]


def test_batch_size_does_not_matter_where_samples_run_one_by_one():
    """However many samples a batch was to hold, the model sees one."""
    model = sees_what_comes_after()
    forget, retain = rows_of(toy_samples(3, seed=4)), rows_of(toy_samples(6, seed=5))
    one, many = (rank_parameters(model, None, forget, retain, tokens_per_batch=n) for n in (1, 2048))
    assert one.scores == pytest.approx(many.scores, rel=1e-6)
