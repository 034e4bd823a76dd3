"""Every loss on a table of probabilities small enough for pencil and paper."""

from math import log

import pytest
import torch

from fillm.capture import sample_losses
from fillm.data import collate
from fillm.unlearn.losses import LossOptions, make_loss
from fillm.unlearn.reference import ReferenceRows
from tests.unlearn.table_model import TableModel, sample_set

P = torch.tensor(
    [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.75, 0.125, 0.0625, 0.0625], [0.125, 0.5, 0.25, 0.125]],
    dtype=torch.float64,
)
# Answer tokens 0 and 1, both after a 0: probabilities 1/2 and 1/4. Answer token 0 after a 2: 3/4.
FORGET = sample_set(([1, 0, 0, 1], 2), ([3, 2, 0], 2))
# Answer token 2 after a 0, and 1 after a 2: 1/8 both.
IDK = sample_set(([1, 0, 2], 2), ([3, 2, 1], 2))
# The original gives every token 1/4.
ORIGINAL_NLL, ORIGINAL_IDK_NLL = torch.tensor([2 * log(4), log(4)]), torch.tensor([log(4), log(4)])
UNIFORM = torch.full((3, 4), log(0.25))

CASES = {
    "ga": (LossOptions(), [-(log(2) + log(4)) / 2, -log(4 / 3)]),
    "grad-diff": (LossOptions(), [-(log(2) + log(4)) / 2, -log(4 / 3)]),
    "kl": (LossOptions(), [-(log(2) + log(4)) / 2, -log(4 / 3)]),
    "idk": (LossOptions(), [log(8), log(8)]),
    # p/p0 of the answers: (1/8)/(1/16) = 2 and (3/4)/(1/4) = 3.
    "npo": (LossOptions(beta=1.0), [2 * log(1 + 2), 2 * log(1 + 3)]),
    # Of the refusals: 1/2 both. sigmoid(log(1/2) - log 2) = 1/5, sigmoid(log(1/2) - log 3) = 1/7.
    "dpo": (LossOptions(beta=1.0), [2 * log(5), 2 * log(7)]),
    # sigmoid(2 * (mean loss - log 2)): p^(2/n) is 1/8 and 9/16, times 4.
    "simnpo": (LossOptions(beta=2.0, delta=log(2)), [log(1 + 4 / 8), log(1 + 4 * 9 / 16)]),
    # Uniform with one logit lowered by log 3: 1/10 at the answer, 3/10 elsewhere.
    "undial": (
        LossOptions(beta=log(3)),
        [
            (0.1 * log(2) + 0.3 * log(4) + 0.6 * log(8) + 0.3 * log(2) + 0.1 * log(4) + 0.6 * log(8)) / 2,
            0.1 * log(4 / 3) + 0.3 * log(8) + 0.6 * log(16),
        ],
    ),
    "wga": (LossOptions(beta=2.0), [-(log(2) / 4 + log(4) / 16) / 2, -(9 / 16) * log(4 / 3)]),
    "satimp": (
        LossOptions(beta1=2.0, beta2=3.0),
        [-(log(2) / 4 / 8 + log(4) / 16 * 27 / 64) / 2, -(9 / 16) / 64 * log(4 / 3)],
    ),
}


def reference_of(recorded, nll):
    return None if recorded is None else ReferenceRows(nll if recorded.kind == "nll" else UNIFORM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_forget_values(name, dtype):
    options, expected = CASES[name]
    loss, model = make_loss(name, options), TableModel(P.log().to(dtype))
    before = model.head.weight.detach().clone()
    alternatives = collate(IDK, [0, 1]) if loss.uses_alternatives else None
    values = loss.forget_values(
        model,
        collate(FORGET, [0, 1]),
        reference_of(loss.needs.get("forget"), ORIGINAL_NLL),
        alternatives,
        reference_of(loss.needs.get("alternatives"), ORIGINAL_IDK_NLL),
    )
    assert values.dtype == dtype and values.requires_grad
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert torch.equal(model.head.weight, before)


def test_a_retain_term_of_losses():
    loss, model = make_loss("npo"), TableModel(P.log())
    assert loss.uses_retain and "retain" not in loss.needs
    values = loss.retain_values(model, collate(FORGET, [0, 1]))
    torch.testing.assert_close(values.tolist(), [(log(2) + log(4)) / 2, log(4 / 3)], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [make_loss("kl"), make_loss("grad-diff", LossOptions(retain_loss="kl"))])
def test_a_retain_term_of_divergence(loss):
    assert loss.needs["retain"].kind == "distributions"
    values = loss.retain_values(TableModel(P.log()), collate(FORGET, [0, 1]), ReferenceRows(UNIFORM))
    # sum_v 1/4 log((1/4) / p_v), after a 0 (twice) and after a 2
    expected = [(log(1 / 2) + log(2) + log(2)) / 4, (log(1 / 3) + log(2) + log(4) + log(4)) / 4]
    torch.testing.assert_close(values.tolist(), expected, rtol=1e-6, atol=1e-7)


def test_divergence_from_itself_is_nothing():
    model, batch = TableModel(P.log()), collate(FORGET, [0, 1])
    own = P.log()[[0, 0, 2]]
    values = make_loss("kl").retain_values(model, batch, ReferenceRows(own))
    (gradient,) = torch.autograd.grad(values.sum(), model.head.weight)
    assert values.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize(("layer", "scale"), [(0, 2.0), (1, 6.0)])
def test_misdirection(layer, scale):
    loss = make_loss("rmu", LossOptions(rmu_layer=layer, rmu_coefficient=5.0, seed=3))
    model, batch = TableModel(P.log()), collate(FORGET, [0, 1])
    u = (loss.control_vector(4) / 5.0).tolist()
    assert abs(sum(x * x for x in u) - 1) < 1e-6 and min(u) >= 0
    # |s e_t - c u|^2 = s^2 - 2 s c u_t + c^2 at the answers' own tokens: 0 and 1, and 0
    square = [(scale**2 - 2 * scale * 5 * u[token] + 25) / 4 for token in range(4)]
    values = loss.forget_values(model, batch)
    torch.testing.assert_close(values.tolist(), [(square[0] + square[1]) / 2, square[0]], rtol=1e-6, atol=1e-6)
    assert loss.needs == {"retain": loss.needs["retain"]} and loss.needs["retain"].layer == layer
    original = ReferenceRows(torch.eye(4)[[0, 1, 0]])  # of a model whose blocks leave everything as it is
    values = loss.retain_values(model, batch, original)
    torch.testing.assert_close(values.tolist(), [(scale - 1) ** 2 / 4] * 2, rtol=1e-6, atol=1e-6)


def test_the_control_vector_is_its_seeds():
    first, again, other = (make_loss("rmu", LossOptions(seed=seed)).control_vector(9) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_token_known_by_heart_keeps_the_digits_of_what_is_missing():
    weights = make_loss("satimp", LossOptions(beta1=0.0, beta2=1.0)).weights(torch.tensor([1e-12, 1e-3]))
    torch.testing.assert_close(weights.tolist(), [1e-12, 9.995001666e-4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name != "idk"])
def test_a_step_down_the_forget_term_raises_the_loss_of_the_answers(name):
    """The sign: for a small step along -gradient, by the inner product of the two gradients."""
    options, _ = CASES[name]
    loss, model, batch = make_loss(name, options), TableModel(P.log()), collate(FORGET, [0, 1])
    values = loss.forget_values(
        model,
        batch,
        reference_of(loss.needs.get("forget"), ORIGINAL_NLL),
        collate(IDK, [0, 1]) if loss.uses_alternatives else None,
        reference_of(loss.needs.get("alternatives"), ORIGINAL_IDK_NLL),
    )
    (downhill,) = torch.autograd.grad(values.mean(), model.head.weight)
    (uphill,) = torch.autograd.grad(sample_losses(model, batch).mean(), model.head.weight)
    assert (downhill * uphill).sum() < 0
