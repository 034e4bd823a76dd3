"""Every localisation method on whole tensors against formulas written out in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fillm import rank_parameters
from fillm.data import Sample, SampleSet
from fillm.errors import ModelError, UsageError
from tests.capture.reference import reference_gradients
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, Direct, family, rows_of

FAMILIES = ("opt", "llama-tied", "gpt2", "mixtral")
FORGET_ONLY = ("saliency", "wagle", "memflex", "parameter-shift", "random", "none")


RTOL = 1e-4  # float32 gradients through a few layers


def ranked(model, method="soir", **settings):
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, method, **settings)


def columns(ranking):
    return {row["name"]: row for row in ranking}


def assert_order(ranking, ascending=False):
    """By score, with what is unused at the end; ranks count from 1."""
    rows = list(ranking)
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    idle = ["unused" in row["note"] for row in rows]
    assert idle == sorted(idle)
    scores = [row["score"] for row in rows if "unused" not in row["note"]]
    assert scores == sorted(scores, reverse=not ascending)


def assert_unused(ranking, direct):
    assert {row["name"] for row in ranking if "unused" in row["note"]} == direct.unused()


@pytest.mark.parametrize("name", FAMILIES)
def test_soir_scores_the_norm_of_u_inside_its_bracket(name):
    model, direct = family(name)
    ranking = ranked(model)
    assert set(ranking.scores) == set(direct.u) and ranking.updates is None
    assert_order(ranking)
    assert_unused(ranking, direct)
    for row in ranking:
        tensor = row["name"]
        exact = float(direct.u[tensor].norm())
        assert row["score_low"] <= exact * (1 + 1e-6) and exact <= row["score_high"] * (1 + 1e-6), tensor
        assert row["score"] == pytest.approx(exact, rel=1e-3), tensor
        v = direct.v[tensor]
        assert row["damping"] == pytest.approx(direct.lambda_[tensor], rel=RTOL)
        squares = [float(one[tensor].square().sum()) for one in direct.g]
        assert row["mean_retain_sq_norm"] == pytest.approx(sum(squares) / len(squares), rel=RTOL)
        assert row["forget_norm"] == pytest.approx(float(v.norm()), rel=RTOL)
        assert row["predicted_forget_gain"] == pytest.approx(-float((v * direct.u[tensor]).sum()), rel=1e-3)
        assert row["retain_damage"] is None


def test_a_key_bias_without_rotary_positions_is_unused():
    model, direct = family("opt")
    keys = {f"model.decoder.layers.{layer}.self_attn.k_proj.bias" for layer in range(2)}
    assert keys <= direct.unused()
    assert set(ranked(model).names[-len(direct.unused()) :]) == direct.unused()


@pytest.mark.parametrize("name", FAMILIES)
def test_soir_sum_scores_the_mean_absolute_entry_of_its_own_u(name):
    model, direct = family(name)
    ranking = ranked(model, "soir-sum", save_update=True)
    assert_order(ranking)
    assert_unused(ranking, direct)
    for tensor, score in ranking.scores.items():
        u = direct.soir_sum(tensor)
        assert score == pytest.approx(float(u.abs().mean()), rel=RTOL, abs=1e-18), tensor
        assert float((ranking.updates[tensor] - u).norm()) <= RTOL * float(u.norm()), tensor
        assert columns(ranking)[tensor]["damping"] == 0.1
    other = ranked(model, "soir-sum", score="l2", damping=0.4)
    for tensor, score in other.scores.items():
        assert score == pytest.approx(float(direct.soir_sum(tensor, 0.4).norm()), rel=RTOL, abs=1e-18), tensor


def test_memflex_puts_kept_tensors_first_and_says_what_it_measured():
    model, direct = family("opt")
    cosines = {
        n: float(nn.functional.cosine_similarity(direct.v[n].flatten(), direct.r[n].flatten(), 0)) for n in direct.v
    }
    means = {n: float(v.abs().mean()) for n, v in direct.v.items()}
    used = [n for n in means if n not in direct.unused()]
    similarity, magnitude = sorted(cosines[n] for n in used)[-8] + 1e-5, sorted(means[n] for n in used)[8] * 1.001
    kept = {n for n in used if cosines[n] < similarity and means[n] > magnitude}
    below, alike = [n for n in used if means[n] <= magnitude], [n for n in used if cosines[n] >= similarity]
    assert kept and below and alike and max(means[n] for n in set(used) - kept) > min(means[n] for n in kept)

    ranking = ranked(model, "memflex", similarity=similarity, magnitude=magnitude)
    assert_unused(ranking, direct)
    names = ranking.names
    assert names[: len(kept)] == sorted(kept, key=lambda n: -means[n])
    assert names[len(kept) : len(used)] == sorted(set(used) - kept, key=lambda n: -means[n])
    assert set(names[len(used) :]) == direct.unused()
    for row in ranking:
        assert row["score"] == pytest.approx(means[row["name"]], rel=RTOL, abs=1e-18)
        if row["name"] in used:
            word, figure, *rest = row["note"].replace(",", "").split(maxsplit=2)
            assert word == "cosine" and float(figure) == pytest.approx(cosines[row["name"]], abs=6e-4)
            assert rest == ([] if row["name"] in kept else ["not kept"])


def test_memflex_thresholds_at_their_ends():
    model, direct = family("opt")
    everything = ranked(model, "memflex", similarity=1.1, magnitude=0.0)
    assert not any("not kept" in row["note"] for row in everything)
    for settings in ({"similarity": -1.1}, {"magnitude": 1e9}):
        nothing = ranked(model, "memflex", **settings)
        assert all("not kept" in row["note"] for row in nothing if row["name"] not in direct.unused())
        assert nothing.names == everything.names


def test_wagle_and_saliency_sum_over_the_weights():
    model, direct = family("opt")
    theta = dict(model.named_parameters())
    for ranking, weight in (
        (ranked(model, "saliency"), lambda n: direct.v[n]),
        (ranked(model, "wagle"), lambda n: (theta[n] - direct.r[n] / 1e-3) * direct.v[n]),
        (ranked(model, "wagle", mu=2.5), lambda n: (theta[n] - direct.r[n] / 2.5) * direct.v[n]),
    ):
        assert_order(ranking)
        assert_unused(ranking, direct)
        for name, score in ranking.scores.items():
            assert score == pytest.approx(float(weight(name).abs().sum()), rel=RTOL, abs=1e-18), name
        assert columns(ranking)[ranking.names[0]]["forget_norm"] == pytest.approx(
            float(direct.v[ranking.names[0]].norm())
        )


def test_saliency_needs_no_retain_set():
    model, _ = family("opt")
    assert rank_parameters(model, None, FORGET_ROWS, None, "saliency").table.equals(ranked(model, "saliency").table)
    with pytest.raises(UsageError, match="--retain is needed"):
        rank_parameters(model, None, FORGET_ROWS, None, "wagle")


def test_parameter_shift_scores_the_distance_and_notes_the_relative_one():
    model, base = build_family("gpt2", dtype=torch.float64), build_family("gpt2", seed=3, dtype=torch.float64)
    same = "transformer.ln_f.weight"
    dict(base.named_parameters())[same].data.copy_(dict(model.named_parameters())[same])
    ranking = rank_parameters(model, None, FORGET_ROWS, None, "parameter-shift", base_model=base)
    assert_order(ranking)
    before = dict(base.named_parameters())
    for name, theta in model.named_parameters():
        shift, row = theta - before[name], columns(ranking)[name]
        assert row["score"] == pytest.approx(float(shift.norm()), rel=RTOL), name
        assert row["note"] == f"relative {float(shift.norm() / before[name].norm()):.3e}"
    assert ranking.names[-1] == same and ranking.scores[same] == 0.0


def test_parameter_shift_of_nearly_equal_float64_models_keeps_its_digits():
    model, base = build_family("opt", dtype=torch.float64), build_family("opt", dtype=torch.float64)
    for parameter in base.parameters():
        parameter.data += 1e-10
    ranking = rank_parameters(model, None, FORGET_ROWS, None, "parameter-shift", base_model=base)
    for row in ranking:
        assert row["score"] == pytest.approx(1e-10 * math.sqrt(row["numel"]), rel=1e-4), row["name"]


def test_parameter_shift_takes_a_tied_base_for_an_untied_model():
    model, tied = build_family("llama"), build_family("llama-tied")
    ranking = rank_parameters(model, None, FORGET_ROWS, None, "parameter-shift", base_model=tied)
    head = dict(model.named_parameters())["lm_head.weight"].double()
    expected = (head - tied.get_input_embeddings().weight.double()).norm()
    assert ranking.scores["lm_head.weight"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("other", ["gpt2", "llama-wide"])
def test_parameter_shift_refuses_another_model(other):
    model = build_family("llama")
    base = build_family("gpt2") if other == "gpt2" else build_family("llama")
    if other == "llama-wide":
        base.model.layers[1].mlp.up_proj.weight.data = torch.zeros(57, 32)
    with pytest.raises(ModelError, match=r"--base-model: has no tensor model\.\S+ of shape \[\d+, \d+\]"):
        rank_parameters(model, None, FORGET_ROWS, None, "parameter-shift", base_model=base)


def test_parameter_shift_needs_a_base_model():
    with pytest.raises(UsageError, match="needs --base-model"):
        ranked(family("opt")[0], "parameter-shift")


def test_random_is_seeded_and_none_keeps_the_order_of_the_model():
    model, _ = family("opt")
    first, again, other = (ranked(model, "random", seed=seed) for seed in (1, 1, 2))
    assert first.table.equals(again.table) and first.names != other.names
    assert all(0.0 <= score < 1.0 for score in first.scores.values()) and len(set(first.scores.values())) == len(first)
    assert set(first.names) == set(other.names) == {name for name, _ in model.named_parameters()}
    in_order = [name for name, _ in model.named_parameters()]
    assert ranked(model, "none").names == in_order != sorted(in_order)
    # A tensor's draw is its own: a smaller scope does not reshuffle the rest.
    part = ranked(model, "random", seed=1, include="mlp")
    assert part.names == [name for name in first.names if name in set(part.names)]


@pytest.mark.parametrize("method", FORGET_ONLY)
@pytest.mark.parametrize("setting", [{"objective": "retain"}, {"objective": "trade-off"}, {"save_update": True}])
def test_methods_without_u_refuse_what_needs_one(method, setting):
    with pytest.raises(UsageError, match=f"needs a method with an update u .*not {method}"):
        ranked(family("opt")[0], method, **setting)


TOPIC, VOCAB, WIDTH = 7, 31, 8


class TopicModel(nn.Module):
    """`topic` acts only on samples that hold token `TOPIC`, `elsewhere` only on the others, `spare` on none."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.topic, self.elsewhere = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.spare = nn.Parameter(torch.ones(3, 2))

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        h = torch.tanh(self.embed(input_ids).cumsum(1))
        on_topic = (input_ids == TOPIC).any(1).to(h.dtype)[:, None, None]
        h = h + torch.tanh(self.topic(h)) * on_topic + torch.tanh(self.elsewhere(h)) * (1.0 - on_topic)
        return SimpleNamespace(logits=self.head(h))


def topic_setting():
    model = TopicModel().double().requires_grad_(False).eval()
    draw = torch.Generator().manual_seed(5)

    def samples(count, first):
        out = []
        for index in range(count):
            ids = [first, *torch.randint(8, VOCAB, (5 + index,), generator=draw).tolist()]
            out.append(Sample(f"s{index}", tuple(ids), (-100, -100, *ids[2:])))
        return SampleSet(out, "topic")

    forget, retain = samples(3, TOPIC), samples(4, 3)
    return model, forget, retain


ONLY_FORGET, ONLY_RETAIN = {"topic.weight", "topic.bias"}, {"elsewhere.weight", "elsewhere.bias"}


@pytest.mark.parametrize("objective", ["forget", "retain", "trade-off"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "element"])
def test_zero_curvature_under_every_objective(objective, granularity):
    """Without a retain gradient any step is possible at no damage; without any gradient there is no step."""
    model, forget, retain = topic_setting()
    ranking = rank_parameters(
        model, None, rows_of(forget), rows_of(retain), objective=objective, granularity=granularity
    )
    rows = list(ranking)
    for row in rows:
        if row["name"] == "spare":
            assert row["note"] == "unused"
            continue
        if row["name"] in ONLY_FORGET:
            assert row["note"] == "no retain gradient"
            assert row["score"] == (math.inf if objective == "forget" else 0.0)
    free = [row["rank"] for row in rows if row["name"] in ONLY_FORGET]
    used = [row["rank"] for row in rows if "unused" not in row["note"]]
    if objective == "forget":
        assert sorted(free) == used[: len(free)]
    assert {row["name"] for row in rows if row["rank"] > max(used)} >= {"spare"}
    if granularity == "tensor":
        assert rows[-1]["name"] == "spare" and rows[-1]["score"] in (0.0, math.inf)


@pytest.mark.parametrize("objective", ["forget", "retain"])
def test_soir_sum_without_a_retain_gradient_has_the_score_of_its_formula(objective):
    """Its damping is no curvature: `u = -v / (n lambda)` is finite where `r = 0`."""
    model, forget, retain = topic_setting()
    direct = Direct(reference_gradients(model, forget), reference_gradients(model, retain))
    ranking = rank_parameters(
        model, None, rows_of(forget), rows_of(retain), "soir-sum", objective=objective, save_update=True
    )
    for name in ONLY_FORGET:
        u = direct.soir_sum(name)
        assert torch.allclose(ranking.updates[name], u) and float(u.norm()) > 0
        assert ranking.scores[name] == pytest.approx(float(u.abs().mean()) if objective == "forget" else 0.0)
        assert columns(ranking)[name]["note"] == "no retain gradient"


@pytest.mark.parametrize("method", ["soir", "soir-sum", "memflex", "wagle", "saliency"])
def test_what_only_the_retain_set_reaches_is_not_called_unused(method):
    model, forget, retain = topic_setting()
    ranking = rank_parameters(model, None, rows_of(forget), rows_of(retain), method)
    noted = {row["name"] for row in ranking if "unused" in row["note"]}
    # Saliency has seen the forget set alone.
    assert noted == ({"spare"} | ONLY_RETAIN if method == "saliency" else {"spare"})
    assert all(ranking.scores[name] == 0.0 for name in ONLY_RETAIN)
    assert ranking.names[-1] == "spare" or method == "saliency"
