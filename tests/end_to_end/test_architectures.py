"""Every causal-LM architecture of the installed transformers against float64 autograd, and the page that says so."""

import csv

import pytest
import torch

from benchmarks.architectures import __main__ as command
from benchmarks.architectures.page import PAGE, page, share
from benchmarks.architectures.reference import reference
from benchmarks.architectures.results import RESULTS, read
from benchmarks.architectures.small import causal_lm_types, small_model
from benchmarks.architectures.walk import FORGET, RETAIN, compare, examine, walk
from fillm.rank import rank_parameters

# Transposed weights, parallel blocks, multi-query, soft-capping with (1 + w) norms, latent attention, fused and shared
# experts, recurrence, and an encoder that decodes.
SOME = ("gpt2", "cohere", "falcon", "gemma2", "deepseek_v3", "qwen2_moe", "mamba", "bert")


@pytest.fixture(autouse=True)
def the_callers_random_state():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("model_type", SOME)
def test_a_representative_part_equals_float64_autograd(model_type):
    record = examine(model_type)
    assert record["outcome"] == "ok", record["reason"]
    assert share(record) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five to ten minutes on one core
def test_every_architecture_comes_out_as_the_page_says():
    stated = {record["model_type"]: record["outcome"] for record in read(RESULTS)}
    found = {record["model_type"]: record for record in walk(causal_lm_types())}
    worse = {
        name: (record["outcome"], record["reason"])
        for name, record in found.items()
        if record["outcome"] != "ok" and stated.get(name, "ok") == "ok"
    }
    assert worse == {}
    built = [record for record in found.values() if record["outcome"] != "not buildable"]
    assert sum(record["outcome"] == "ok" for record in built) >= 0.95 * len(built)


def test_the_page_is_that_of_the_results():
    assert PAGE.read_text(encoding="utf-8") == page(read(RESULTS))


def test_the_results_hold_every_architecture_of_their_transformers():
    names = [record["model_type"] for record in read(RESULTS)]
    assert names == sorted(set(names)) and len(names) > 180


def test_the_comparison_sees_one_wrong_tensor():
    model = small_model("llama")
    expected = reference(model, FORGET, RETAIN)
    ranking = rank_parameters(model, None, FORGET, RETAIN, save_update=True)
    errors, _ = compare(ranking, expected)
    assert 0.0 < max(errors.values()) < 1e-4
    name = "model.layers.1.mlp.up_proj.weight"
    ranking.updates[name][0, 0] += 0.01 * float(expected[name].u.norm())
    changed, _ = compare(ranking, expected)
    assert changed.pop(name) == pytest.approx(0.01, rel=0.02)
    errors.pop(name)
    assert changed == errors


def test_the_reference_is_the_gradient_of_the_loss():
    model = small_model("llama")
    [name] = [name for name, _ in model.named_parameters() if name == "model.norm.weight"]
    answer = reference(model, FORGET[:1], RETAIN)[name]
    twin = model.double()
    ids, labels = (torch.tensor([FORGET[0][key]]) for key in ("input_ids", "labels"))
    weight = dict(twin.named_parameters())[name].requires_grad_(True)
    (gradient,) = torch.autograd.grad(twin(input_ids=ids, labels=labels).loss, weight)
    assert float((answer.v - gradient).norm()) < 1e-4 * float(gradient.norm())


@pytest.mark.slow
def test_a_part_joins_the_lines_that_are_there(tmp_path, capsys):
    out = tmp_path / "architectures.csv"
    command.main(["--only", "gpt2", "--out", str(out)])
    command.main(["--only", "llama,opt", "--part", "1/2", "--out", str(out)])
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model_type"], row["outcome"]) for row in rows] == [("gpt2", "ok"), ("llama", "ok")]
    assert capsys.readouterr().out.count(" ok ") == 2


def test_an_unknown_architecture_is_a_wrong_use():
    with pytest.raises(SystemExit, match="--only nosuch: the installed transformers has no such"):
        command.main(["--only", "nosuch"])
