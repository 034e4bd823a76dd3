"""Gradients against a naive float64 restatement, and values that do not depend on who else is in the batch."""

from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fillm.data import collate
from fillm.errors import UsageError
from fillm.unlearn.losses import GRADIENT_LOSSES, LossOptions, make_loss
from fillm.unlearn.reference import ReferenceRows
from tests.unlearn.table_model import TableModel, sample_set

SIZE = 11
FORGET = sample_set(([4, 9, 2, 2, 7], 2), ([1, 10], 1), ([3, 3, 5, 8, 0, 6, 1], 3), ([5, 6, 7], 2))
IDK = sample_set(([4, 9, 1], 2), ([1, 0, 0, 8], 1), ([3, 3, 5, 2], 3), ([5, 6, 0, 9], 2))
OPTIONS = {"rmu": LossOptions(rmu_layer=1), "undial": LossOptions(alpha=0.7)}


def steps(samples):
    """(token before, answer token) of every answer token, sample by sample, by the definition."""
    return [
        [(s.input_ids[t - 1], s.labels[t]) for t in range(1, len(s.labels)) if s.labels[t] != -100] for s in samples
    ]


def naive_forget(loss, table, original):
    """Each sample's forget value from [V, V] logits after each token."""

    def logp(logits, before):
        return logits[before] - logits[before].exp().sum().log()

    def answer(logits, pairs):
        return sum(logp(logits, before)[token] for before, token in pairs)

    values = []
    for pairs, refusal in zip(steps(FORGET), steps(IDK), strict=True):
        n, name = len(pairs), loss.name
        if name in ("ga", "grad-diff", "kl"):
            value = answer(table, pairs) / n
        elif name == "idk":
            value = -answer(table, refusal) / len(refusal)
        elif name == "npo":
            ratio = (answer(table, pairs) - answer(original, pairs)).exp()
            value = 2 / loss.beta * (1 + ratio**loss.beta).log()
        elif name == "dpo":
            ratio = (answer(table, pairs) - answer(original, pairs)).exp()
            better = (answer(table, refusal) - answer(original, refusal)).exp()
            value = 2 / loss.beta * (1 + (ratio / better) ** loss.beta).log()
        elif name == "simnpo":
            inner = loss.beta * (-answer(table, pairs) / n - loss.delta)
            value = -2 / loss.beta * (1 / (1 + (-inner).exp())).log()
        elif name == "undial":
            value = 0
            for before, token in pairs:
                lowered = original[before].clone()
                lowered[token] -= loss.beta
                q = lowered.exp() / lowered.exp().sum()
                value = value - (q * logp(table, before)).sum() / n
        else:
            value = 0
            for before, token in pairs:
                p = logp(table, before)[token].detach().exp()
                weight = p**loss.beta if name == "wga" else p**loss.beta1 * (1 - p) ** loss.beta2
                value = value + weight * logp(table, before)[token] / n
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("name", [name for name in GRADIENT_LOSSES if name != "rmu"])
def test_forget_values_and_gradients(name):
    table, original = (2 * torch.randn(SIZE, SIZE, dtype=torch.float64) for _ in range(2))
    table.requires_grad_(True)
    loss = make_loss(name, OPTIONS.get(name))
    weights = torch.tensor([0.3, 1.0, -2.0, 0.5], dtype=torch.float64)
    expected = naive_forget(loss, table, original)
    (expected_gradient,) = torch.autograd.grad(weights @ expected, table)

    model = TableModel(table.detach(), (1.0, 1.0))
    logp = original.log_softmax(1)

    def reference(recorded, samples):
        if recorded is None:
            return None
        if recorded.kind == "nll":
            return ReferenceRows(-torch.stack([sum(logp[a, b] for a, b in pairs) for pairs in steps(samples)]))
        return ReferenceRows(torch.stack([logp[a] for pairs in steps(samples) for a, _ in pairs]))

    values = loss.forget_values(
        model,
        collate(FORGET, range(4)),
        reference(loss.needs.get("forget"), FORGET),
        collate(IDK, range(4)) if loss.uses_alternatives else None,
        reference(loss.needs.get("alternatives"), IDK),
    )
    (gradient,) = torch.autograd.grad(weights @ values, model.head.weight)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient.T, expected_gradient, rtol=1e-10, atol=1e-13)


def test_retain_divergence_gradient():
    table, original = (2 * torch.randn(SIZE, SIZE, dtype=torch.float64) for _ in range(2))
    table.requires_grad_(True)
    kl = (original.softmax(1) * (original.softmax(1).log() - table.softmax(1).log())).sum(1)
    expected = torch.stack([sum(kl[a] for a, _ in pairs) / len(pairs) for pairs in steps(FORGET)])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), table)
    model = TableModel(table.detach(), (1.0, 1.0))
    rows = torch.stack([original.log_softmax(1)[a] for pairs in steps(FORGET) for a, _ in pairs])
    values = make_loss("kl").retain_values(model, collate(FORGET, range(4)), ReferenceRows(rows))
    (gradient,) = torch.autograd.grad(values.sum(), model.head.weight)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient.T, expected_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["npo", "dpo", "undial"])
def test_a_reference_that_is_missing_is_asked_for(name):
    with pytest.raises(UsageError, match="ReferenceCache"):
        make_loss(name).forget_values(TableModel(torch.zeros(SIZE, SIZE)), collate(FORGET, [0]))


def test_alternatives_have_to_be_of_the_same_samples():
    model, loss = TableModel(torch.zeros(SIZE, SIZE)), make_loss("idk")
    with pytest.raises(UsageError, match="needs alternatives"):
        loss.forget_values(model, collate(FORGET, [0, 1]))
    with pytest.raises(UsageError, match="other samples"):
        loss.forget_values(model, collate(FORGET, [0, 1]), alternatives=collate(IDK, [1, 0]))


@pytest.fixture(scope="module")
def llama():
    """A model in which tokens see one another; in float64, where eager attention makes NaN of padding on the left."""
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(GRADIENT_LOSSES),
    layout=st.sampled_from(["right", "left", "packed"]),
    order=st.permutations(range(4)),
    cuts=st.sets(st.integers(1, 3)),
)
def test_values_do_not_depend_on_the_batch(llama, name, layout, order, cuts):
    loss = make_loss(name, OPTIONS.get(name))
    generator = torch.Generator().manual_seed(0)
    recorded = {}
    for key, samples in (("forget", FORGET), ("retain", FORGET), ("alternatives", IDK)):
        for index, sample in enumerate(samples):
            what, tokens = loss.needs.get(key), sample.num_counted
            shape = {"nll": (1,), "distributions": (tokens, SIZE), "block": (tokens, 8)}.get(getattr(what, "kind", ""))
            recorded[key, index] = None if shape is None else torch.rand(shape, generator=generator).double()

    def rows(key, members):
        parts = [recorded[key, index] for index in members]
        return None if parts[0] is None else ReferenceRows(torch.cat(parts))

    def values(members, layout):
        batch = collate(FORGET, members, layout)
        other = collate(IDK, members, layout) if loss.uses_alternatives else None
        with torch.no_grad():
            forget = loss.forget_values(llama, batch, rows("forget", members), other, rows("alternatives", members))
            return forget, loss.retain_values(llama, batch, rows("retain", members))

    bounds = [0, *sorted(cuts), 4]
    for members in (order[a:b] for a, b in pairwise(bounds)):
        found = values(members, layout)
        for position, index in enumerate(members):
            for together, alone in zip(found, values([index], "right"), strict=True):
                torch.testing.assert_close(together[position], alone[0], rtol=1e-10, atol=1e-12)
