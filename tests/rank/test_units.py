"""Rows, heads and single weights of every method, and the objectives, against formulas written out in float64."""

import math
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn

from fillm import rank_parameters
from fillm.errors import UsageError
from fillm.models import catalogue
from fillm.rank.units import groups_of, numels, retain_changes
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, Direct, direct_of, family, rows_of
from tests.rank.test_methods import topic_setting

RTOL = 1e-4  # float32 gradients through a few layers
HEAD_DIM, HEADS = 8, 4  # of every tiny family


def ranked(model, method="soir", **settings):
    return rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, method, **settings)


def output_neurons(name: str, family_name: str, tensor: Tensor) -> Tensor:
    """[units, entries of each]: a unit is one output neuron."""
    if tensor.ndim == 1:
        return tensor[:, None]
    conv1d = family_name == "gpt2" and (".attn." in name or ".mlp." in name)
    return tensor.T if conv1d else tensor.reshape(-1, tensor.shape[-1])  # a stack's index is expert * rows + row


def heads(name: str, family_name: str, tensor: Tensor) -> Tensor | None:
    """[heads, entries of each]; None for tensors without heads."""
    if family_name == "gpt2":
        if ".attn.c_attn" in name:  # columns: queries, keys, values, each head by head
            pieces = tensor.reshape(-1, 3, HEADS, HEAD_DIM)
            return pieces.permute(2, 0, 1, 3).reshape(HEADS, -1)
        return tensor.reshape(HEADS, -1) if name.endswith("attn.c_proj.weight") else None
    if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
        return tensor.reshape(tensor.shape[0] // HEAD_DIM, -1)
    if name.endswith(("o_proj.weight", "self_attn.out_proj.weight")):
        return tensor.reshape(-1, HEADS, HEAD_DIM).permute(1, 0, 2).reshape(HEADS, -1)
    return None


def elements(name: str, family_name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 1)


def whole(name: str, family_name: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1)


UNITS = {"tensor": whole, "row": output_neurons, "head": heads, "element": elements}


def by_tensor(ranking) -> dict[str, list[dict]]:
    """Table rows of each tensor in the order of their index."""
    out: dict[str, list[dict]] = {}
    for row in ranking:
        out.setdefault(row["name"], []).append(row)
    for rows in out.values():
        rows.sort(key=lambda row: row.get("index", 0))
        assert [row.get("index", 0) for row in rows] == list(range(len(rows)))
    return out


def column(rows: list[dict], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def assert_close(found: Tensor, expected: Tensor, scale: float, what: str) -> None:
    """Entry by entry, an error being measured against the size of the whole tensor's."""
    assert found.shape == expected.shape, what
    assert float((found - expected).abs().max()) <= RTOL * scale, what


def quantity(method: str, model: nn.Module, base: nn.Module, direct: Direct, name: str) -> Tensor:
    """The number of every weight from whose size the method's scores come."""
    theta = dict(model.named_parameters())[name].double()
    if method == "soir":
        return direct.u[name]
    if method == "soir-sum":
        return direct.soir_sum(name)
    if method == "wagle":
        return (theta - direct.r[name] / 1e-3) * direct.v[name]
    return direct.v[name] if method == "saliency" else theta - dict(base.named_parameters())[name].double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("granularity", ["row", "head", "element"])
@pytest.mark.parametrize("method", ["soir", "soir-sum", "wagle", "saliency", "parameter-shift"])
def test_scores_of_units(name, granularity, method):
    model, direct = family(name)
    base = build_family(name, seed=9)
    ranking = ranked(model, method, granularity=granularity, base_model=base if method == "parameter-shift" else None)
    rows = by_tensor(ranking)
    for tensor, theta in model.named_parameters():
        w = quantity(method, model, base, direct, tensor)
        units = UNITS[granularity](tensor, name, w)
        assert (units is None) == (tensor not in rows), tensor
        if units is None:
            continue
        scale = float(w.norm())
        if granularity == "element":
            expected = w.abs().sum()[None]
            assert [row["numel"] for row in rows[tensor]] == [theta.numel()]
            assert_close(column(rows[tensor], "score"), expected, float(expected), tensor)
        else:
            if method in ("soir", "parameter-shift"):
                expected = units.norm(dim=1)
            elif method == "soir-sum":
                expected = units.abs().mean(1)
            else:
                expected, scale = units.abs().sum(1), float(w.abs().sum())
            assert_close(column(rows[tensor], "score"), expected, scale, tensor)
            assert {row["numel"] for row in rows[tensor]} == {units.shape[1]}, tensor
        assert ranking.updates[tensor].shape == theta.shape
        assert float((ranking.updates[tensor] - w).norm()) <= RTOL * float(w.norm()), tensor
    used = [row["score"] for row in ranking if row["note"] != "unused"]
    assert used == sorted(used, reverse=True)


def test_grouped_query_attention_has_fewer_key_and_value_heads():
    ranking = ranked(family("llama")[0], granularity="head")
    counts = {tensor.split(".")[-2]: len(rows) for tensor, rows in by_tensor(ranking).items()}
    assert counts == {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 4}


@pytest.mark.parametrize("method", ["soir", "soir-sum", "parameter-shift"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "head"])
@pytest.mark.parametrize("score", ["l2", "mean-abs"])
def test_the_size_can_be_a_norm_or_a_mean(method, granularity, score):
    model, direct = family("llama")
    base = build_family("llama", seed=9)
    given = {"parameter-shift": {"base_model": base}, "soir": {"tolerance": 1e-9}}.get(method, {})
    rows = by_tensor(ranked(model, method, granularity=granularity, score=score, **given))
    for tensor in rows:
        units = UNITS[granularity](tensor, "llama", quantity(method, model, base, direct, tensor))
        expected = units.norm(dim=1) if score == "l2" else units.abs().mean(1)
        assert_close(column(rows[tensor], "score"), expected, float(expected.norm()), tensor)


def expected_objective(direct: Direct, family_name: str, granularity: str, tensor: str, u: Tensor):
    """Gain, damage and predicted retain change (8) of every unit for the step `u`, and what rounding may do to them."""

    def split(value: Tensor) -> Tensor:
        return UNITS[granularity](tensor, family_name, value.double())

    u, v = split(u), split(direct.v[tensor])
    g = torch.stack([split(one[tensor]) for one in direct.g])  # [n, units, entries]
    s = (g * u).sum(2)
    # A unit's own gradient is off by its own rounding and by its part in that of the whole tensor.
    g_error = 1e-5 * g.norm(dim=2) + 1e-6 * g.flatten(1).norm(dim=1)[:, None]
    s_error = g_error * u.norm(dim=1)
    gain, gain_error = -(v * u).sum(1), (1e-5 * v.norm(dim=1) + 1e-6 * v.norm()) * u.norm(dim=1)
    damage, damage_error = 0.5 * s.square().mean(0), (s.abs() * s_error + s_error.square()).mean(0)
    eta = 0.01 / gain
    change = -eta * s.mean(0) + eta.square() * damage
    terms = (eta * s.mean(0)).abs() + eta.square() * damage
    error = eta.abs() * s_error.mean(0) + eta.square() * damage_error + 4 * terms * gain_error / gain.abs()
    return gain, gain_error, damage, damage_error, change, error


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "head", "element"])
@pytest.mark.parametrize("objective", ["retain", "trade-off"])
def test_objectives(name, granularity, objective):
    model, direct = family(name)
    ranking = ranked(model, granularity=granularity, objective=objective, save_update=True)
    rows = by_tensor(ranking)
    judged = total = 0
    for tensor in rows:
        u = ranking.updates[tensor]
        assert float((u - direct.u[tensor]).norm()) <= RTOL * float(direct.u[tensor].norm()), tensor
        gain, gain_error, damage, damage_error, change, error = expected_objective(direct, name, granularity, tensor, u)
        if granularity == "element":
            found = ranking.updates[f"scores/{tensor}"].double().reshape(-1)
            assert rows[tensor][0]["retain_damage"] == pytest.approx(float(damage.sum()), rel=RTOL)
            finite = found[found.isfinite()]
            summed, size = float(finite.sum()), float(finite.abs().sum())
            assert rows[tensor][0]["score"] == pytest.approx(summed, abs=1e-4 * size)
            assert rows[tensor][0]["predicted_forget_gain"] == pytest.approx(
                float(gain.sum()), abs=RTOL * float(gain.abs().sum())
            )
            damage_error = damage_error + 1e-6 * damage
            error = error + 1e-6 * change.abs()
        else:
            found = column(rows[tensor], "score")
            assert bool(((column(rows[tensor], "retain_damage") - damage).abs() <= damage_error).all()), tensor
            assert bool(((column(rows[tensor], "predicted_forget_gain") - gain).abs() <= gain_error).all()), tensor
        idle = (damage == 0) & (gain == 0)
        if objective == "retain":
            assert bool(((found - damage).abs() <= damage_error)[~idle].all()), tensor
            continue
        rises, falls = gain > 3 * gain_error, gain < -3 * gain_error
        assert bool(((found - change).abs() <= error)[rises].all()), tensor
        assert bool((found[falls] == math.inf).all()), tensor
        judged += int((rises & (error <= 0.02 * change.abs())).sum())
        total += int((~idle).sum())
    if objective == "trade-off":
        assert judged > 0.5 * total  # most were held to a bound that means something
    notes = [row["note"] == "unused" for row in ranking]
    scores = [row["score"] for row in ranking if row["note"] != "unused"]
    assert notes == sorted(notes) and scores == sorted(scores)


@pytest.mark.parametrize("objective", ["retain", "trade-off"])
def test_objectives_of_soir_sum(objective):
    model, direct = family("gpt2")
    ranking = ranked(model, "soir-sum", granularity="row", objective=objective)
    for tensor, rows in by_tensor(ranking).items():
        u = ranking.updates[tensor]
        assert float((u - direct.soir_sum(tensor)).norm()) <= RTOL * float(u.norm()), tensor
        gain, gain_error, damage, damage_error, change, error = expected_objective(direct, "gpt2", "row", tensor, u)
        assert bool(((column(rows, "retain_damage") - damage).abs() <= damage_error).all()), tensor
        if objective == "trade-off":
            rises = gain > 3 * gain_error
            assert bool(((column(rows, "score") - change).abs() <= error)[rises].all()), tensor


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_gains_of_rows_add_up_to_the_gain_of_their_tensor(name):
    model, _ = family(name)
    tensors = by_tensor(ranked(model, save_update=True))
    for tensor, rows in by_tensor(ranked(model, granularity="row")).items():
        gains = column(rows, "predicted_forget_gain")
        whole_gain = tensors[tensor][0]["predicted_forget_gain"]
        assert float(gains.sum()) == pytest.approx(whole_gain, abs=RTOL * float(gains.abs().sum())), tensor


@pytest.mark.parametrize("objective", ["forget", "retain", "trade-off"])
def test_rows_that_no_gradient_reaches_are_unused_and_last(objective):
    """Embedding rows of tokens that never occur: no step there, so no damage, and nothing gained either."""
    model, direct = family("llama")
    ranking = ranked(model, granularity="row", objective=objective)
    name = "model.embed_tokens.weight"
    seen = {token for row in [*FORGET_ROWS, *RETAIN_ROWS] for token in row["input_ids"]}
    rows = by_tensor(ranking)[name]
    noted = {row["index"] for row in rows if row["note"] == "unused"}
    assert set(range(97)) - seen <= noted and noted
    assert all(not direct.u[name][index].any() and not direct.v[name][index].any() for index in noted)
    last = [row["rank"] for row in ranking if row["note"] == "unused"]
    assert last == list(range(len(ranking) - len(last) + 1, len(ranking) + 1))


def test_weights_that_no_gradient_reaches_come_last_among_the_elements():
    model, direct = family("llama")
    scores = ranked(model, granularity="element", objective="retain").updates["scores/model.embed_tokens.weight"]
    reached = (direct.v["model.embed_tokens.weight"] != 0) | (direct.u["model.embed_tokens.weight"] != 0)
    assert bool((~reached).any()) and torch.equal(scores.isfinite(), reached)


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_what_has_no_retain_gradient_leads_unit_by_unit(granularity):
    model, forget, retain = topic_setting()
    ranking = rank_parameters(model, None, rows_of(forget), rows_of(retain), granularity=granularity)
    free = [row for row in ranking if row["name"] == "topic.weight"]
    if granularity == "row":
        assert len(free) == 8 and all(row["score"] == row["predicted_forget_gain"] == math.inf for row in free)
    else:
        assert bool(ranking.updates["scores/topic.weight"].isinf().all()) and free[0]["score"] == math.inf
        assert not ranking.updates["topic.weight"].any()
    assert "scores/head.weight" not in ranking.updates


def test_heads_without_attention_in_scope_are_refused():
    with pytest.raises(UsageError, match="--granularity head: none of the 6 tensors in scope"):
        ranked(family("llama")[0], granularity="head", include="mlp")


@pytest.mark.parametrize("method", ["random", "none", "memflex"])
@pytest.mark.parametrize("granularity", ["row", "head", "element"])
def test_methods_of_whole_tensors_refuse_parts(method, granularity):
    with pytest.raises(UsageError, match=f"--method {method} ranks whole tensors"):
        ranked(family("llama")[0], method, granularity=granularity)


def test_rows_of_adapters_around_transposed_layers():
    """The factors are linear layers even where the layer they adapt is GPT-2's transposed one."""
    config = peft.LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    with warnings.catch_warnings():
        # peft reads a property that transformers has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = peft.get_peft_model(build_family("gpt2"), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    direct = direct_of(model)
    ranking = ranked(model, granularity="row", include="lora")
    for tensor, rows in by_tensor(ranking).items():
        u = direct.u[tensor]
        assert_close(column(rows, "score"), u.norm(dim=1), float(u.norm()), tensor)
    groups = groups_of(model, catalogue(model), "row")
    base = next(name for name in groups if name.endswith("h.0.attn.c_attn.base_layer.weight"))
    assert (groups[base].axis, groups[base].count) == (1, 96)


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "gpt-neox", "phi3", "qwen3-moe"])
@pytest.mark.parametrize("granularity", ["row", "head"])
def test_units_share_out_every_weight_of_their_tensor(name, granularity):
    model = build_family(name)
    scope = catalogue(model)
    groups = groups_of(model, scope, granularity)
    assert groups and (granularity == "head" or set(groups) == {info.name for info in scope})
    for info in scope:
        if info.name in groups:
            sizes = numels(info, groups[info.name])
            counted = groups[info.name].sum_entries(torch.ones(info.shape))
            assert counted.tolist() == sizes and sum(sizes) == info.numel, info.name
    assert groups_of(model, scope, "tensor") == groups_of(model, scope, "element") == {}


def test_retain_changes_by_hand():
    gain, mean = torch.tensor([2.0, 0.0, -1.0]).double(), torch.tensor([3.0, 1.0, 1.0]).double()
    found = retain_changes(gain, mean, torch.tensor([8.0, 1.0, 1.0]).double())
    # eta = 0.005: -0.005 * 3 + 0.5 * 0.005^2 * 8
    assert found.tolist() == [pytest.approx(-0.0149), math.inf, math.inf]
    # The length of u does not matter: u -> 10 u.
    longer = retain_changes(10 * gain, 10 * mean, 100 * torch.tensor([8.0, 1.0, 1.0]).double())
    assert longer[0] == pytest.approx(float(found[0]))
