"""Layers ranked in groups: how they are split, that nothing else changes, and that fewer accumulators exist at once."""

import copy
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from fillm import Ranking, rank_parameters
from fillm.errors import UsageError
from fillm.models import TensorInfo, catalogue
from fillm.rank import soir
from fillm.rank.__main__ import main
from fillm.rank.layer_groups import layer_groups
from fillm.statistics import accumulators, retain
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, family
from tests.rank.test_methods import columns

EXACT = {"tolerance": 1e-9}
METHODS = {
    "soir": {},
    "soir, all exact": EXACT,
    "soir, u": {"save_update": True},
    "soir, damage": {"objective": "retain"},
    "soir, rows traded off": {"granularity": "row", "objective": "trade-off"},
    "soir, heads": {"granularity": "head"},
    "soir, weights by damage": {"granularity": "element", "objective": "retain"},
    "soir, mean-abs": {"score": "mean-abs"},
    "soir, diagonal": {"curvature": "diagonal"},
    "soir, woodbury": {"curvature": "woodbury", "save_update": True},
    "soir-sum": {},
    "gradient": {},
    "gradient, weights": {"granularity": "element"},
    "fisher-ratio": {"granularity": "row"},
    "memflex": {},
    "wagle": {"granularity": "element"},
    "saliency": {"granularity": "head"},
}
QUICK = ("soir", "soir, rows traded off", "fisher-ratio")


def ranked(model: torch.nn.Module, kind: str = "soir", **further: object) -> Ranking:
    method, settings_ = kind.partition(",")[0], METHODS[kind]
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, method, **{**settings_, **further})


def assert_same_bits(found: Ranking, wanted: Ranking) -> None:
    assert found.table.equals(wanted.table)
    assert found.samples.equals(wanted.samples)
    assert found.record["visited_again"] == wanted.record["visited_again"]
    assert (found.updates is None) == (wanted.updates is None)
    if wanted.updates is not None:
        assert set(found.updates) == set(wanted.updates)
        for name, update in wanted.updates.items():
            assert torch.equal(found.updates[name], update), name


# Sizes of what stands below the layers, of the layers, and of what stands above.
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_no_other_cut_has_a_smaller_largest_group(sizes: list[int], count: int) -> None:
    scope = [TensorInfo(f"layers.{i}.w", "mlp", i, size, (size,), (), 0, False, "") for i, size in enumerate(sizes)]
    if count > len(sizes):
        with pytest.raises(UsageError, match=f"--groups {count}: .*give --groups {len(sizes)} or less"):
            layer_groups(scope, count)
        return
    groups = layer_groups(scope, count)
    assert len(groups) == count and all(groups)
    assert [info for group in groups for info in group] == scope
    largest = max(sum(info.numel for info in group) for group in groups)
    cuts = itertools.combinations(range(1, len(sizes)), count - 1)
    bounds = [(0, *cut, len(sizes)) for cut in cuts]
    assert largest == min(max(sum(sizes[a:b]) for a, b in itertools.pairwise(bound)) for bound in bounds)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "gpt2"])
def test_layers_stay_whole_between_embeddings_and_head(name: str) -> None:
    scope = catalogue(build_family(name))
    below, first, second, above = layer_groups(scope, 4)  # two layers and what is around them
    assert {info.layer for info in first} == {0} and {info.layer for info in second} == {1}
    assert {info.kind for info in below} == {"embed"}
    assert {info.kind for info in above} == ({"norm", "lm_head"} if name == "llama" else {"norm"})
    assert sum(map(len, (below, first, second, above))) == len(scope)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param(kind, count, marks=[] if kind in QUICK and count == 3 else pytest.mark.slow)
        for kind in METHODS
        for count in (2, 3, 4)
    ],
)
def test_the_ranking_is_that_of_one_group(kind: str, count: int) -> None:
    """To the bit: what a Llama computes in its layers is the same whether its tensors are in scope or not."""
    model = family("llama")[0]
    assert_same_bits(ranked(model, kind, groups=count), ranked(model, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind != "soir, rows traded off"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt", "mixtral"])
def test_other_families_agree_within_rounding(name: str, kind: str) -> None:
    """Layers out of scope run as the model has them, biases in one operation with the product: rounded otherwise.

    A gradient is then off by a few roundings of float32, 6e-8 each, along the way through the layers; 16 of them are
    1e-6. What is a difference of nearly equal numbers is known to 1e-6 of the largest. The trade-off of a row divides
    by its gain, which for a row whose tokens cancel is known no better than that: left to the test before this one.
    """
    model = family(name)[0]
    found, wanted = ranked(model, kind, groups=3), ranked(model, kind)
    largest = max((row["score"] for row in wanted if row["score"] < float("inf")), default=0.0)
    ours = {(row["name"], row.get("index")): row for row in found}
    for row in wanted:
        one = ours.pop((row["name"], row.get("index")))
        assert one["score"] == pytest.approx(row["score"], rel=1e-6, abs=1e-6 * largest), row
        assert one["note"] == row["note"]
    assert not ours


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_groups_score_the_norm_of_u(name: str) -> None:
    model, direct = family(name)
    found = columns(ranked(model, groups=4))
    assert set(found) == set(direct.u)
    for tensor, row in found.items():
        exact = float(direct.u[tensor].norm())
        assert row["score_low"] <= exact * (1 + 1e-6) and exact <= row["score_high"] * (1 + 1e-6), tensor
        assert row["score"] == pytest.approx(exact, rel=1e-3), tensor  # the tolerance of a bracket


@pytest.mark.parametrize("kind", ["soir", pytest.param("soir, rows traded off", marks=pytest.mark.slow)])
def test_noise_is_told_by_the_largest_gradient_of_all_groups(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With large embeddings the layers change little, and the head, whose group comes last, has by far the largest."""
    model = copy.deepcopy(family("llama")[0])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20.0)
    monkeypatch.setattr(soir, "NOISE", 0.2)
    wanted = ranked(model, kind)
    unused = {row["name"] for row in wanted if "unused" in row["note"]}
    groups = [[info.name for info in group] for group in layer_groups(catalogue(model), 4)]
    late = {row["name"] for row in ranked(model, kind, include=groups[1]) if "unused" not in row["note"]} & unused
    assert late and len(unused) < sum(map(len, groups))  # that of a group by itself could not tell
    for count in (2, 4):
        found = ranked(model, kind, groups=count)
        assert found.table.equals(wanted.table)
        for name, update in (wanted.updates or {}).items():
            assert torch.equal(found.updates[name], update), name


def test_samples_that_are_visited_again_are_those_of_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share their batches with those of the group's tensors alone, so that sums round otherwise, as do batches."""
    monkeypatch.setattr(retain, "EXPANSION_NUMEL", 64)
    model = family("llama")[0]
    found, wanted = (ranked(model, groups=count, tolerance=1e-4) for count in (4, 1))
    assert found.record["visited_again"] == wanted.record["visited_again"] > 0
    assert sum(row["pass"] == "follow-up" for row in found.record["passes"]) > 1
    for tensor, score in wanted.scores.items():
        assert found.scores[tensor] == pytest.approx(score, rel=1e-6), tensor


@pytest.fixture
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most bytes of accumulators that existed at any moment since it was last asked."""
    now, most, real = 0, 0, accumulators.zeros_like

    def gone(size: int) -> None:
        nonlocal now
        now -= size

    def counted(*given: object) -> torch.Tensor:
        nonlocal now, most
        made = real(*given)
        now += made.nbytes
        most = max(most, now)
        weakref.finalize(made, gone, made.nbytes)
        return made

    def asked() -> int:
        nonlocal most
        assert now == 0  # none outlives its ranking
        told, most = most, 0
        return told

    monkeypatch.setattr(accumulators, "zeros_like", counted)
    monkeypatch.setattr(retain, "zeros_like", counted)
    return asked


@pytest.mark.parametrize(
    "kind", ["soir", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("soir, all exact", "soir-sum"))]
)
def test_as_many_accumulators_at_once_as_the_largest_group_takes(kind: str, most_at_once: Callable[[], int]) -> None:
    model = family("llama")[0]
    alone = []
    for group in layer_groups(catalogue(model), 4):
        ranked(model, kind, include=[info.name for info in group])
        alone.append(most_at_once())
    ranked(model, kind, groups=4)
    assert most_at_once() == max(alone)
    ranked(model, kind)
    assert most_at_once() > 1.9 * max(alone)  # 23264 weights, 8512 of them in a layer; small ones have more sums


def test_passes_and_progress_say_which_group(arguments, capsys, tmp_path, nothing_drawn) -> None:
    assert main(arguments("--groups", "3", "--objective", "retain")) == 0
    record = Ranking.load(tmp_path / "run").record
    passes = [(row["pass"], row["group"]) for row in record["passes"]]
    assert passes == [(name, number) for number in (1, 2, 3) for name in ("forget", "retain", "damage")]
    assert [row["layers"] for row in record["groups"]] == ["embeddings, 0", "1", "above"]
    assert sum(row["tensors"] for row in record["groups"]) == len(Ranking.load(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "retain pass, group 2 of 3: 14 samples" in said and "damage pass, group 3 of 3: 14 samples in" in said


def test_the_files_of_groups_are_those_of_one(arguments, tmp_path, nothing_drawn) -> None:
    """`u` is set aside group by group and comes together in the end."""
    for name, further in (("one", []), ("three", ["--groups", "3"])):
        assert main(arguments("--save-update", *further, out=str(tmp_path / name))) == 0
    for file in ("ranking.parquet", "ranking.csv", "samples.parquet", "tensors.parquet", "update.safetensors"):
        assert (tmp_path / "three" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]


@pytest.mark.parametrize(
    ("further", "line"),
    [
        (["--groups", "0"], "--groups must be at least 1, not 0"),
        (["--groups", "2", "--method", "random"], "--method random accumulates no gradients"),
        (["--groups", "2", "--method", "path"], "--method path moves all weights in scope together"),
        (["--groups", "2", "--compression", "sjlt"], "sketches are of all tensors in scope at once"),
        (["--groups", "2", "--curvature", "woodbury"], "exact inner products are taken in groups of tensors that fit"),
    ],
)
def test_what_has_no_groups_is_refused(arguments, fails, further, line) -> None:
    assert line in fails(arguments(*further))


def test_more_groups_than_layers(arguments, fails) -> None:
    assert fails(arguments("--groups", "5")) == (
        "--groups 5: the 21 tensors in scope lie in 4 layers (what stands below them counts as one, and so does what "
        "stands above); give --groups 4 or less"
    )


@pytest.mark.slow
def test_the_arithmetic_of_the_pages() -> None:
    """What docs/rank.md says of an 8B model."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes))
    scope = catalogue(model)
    assert sum(info.numel for info in scope) == 8_030_261_248
    assert max(info.numel for info in scope) == 525_336_576
    assert max(sum(info.numel for info in group) for group in layer_groups(scope, 12)) == 743_452_672
