"""The loss of every row of logits and its gradient, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fillm.capture.losses import LOGIT_ROWS, NegativeLogLikelihood


def exact(logits, wanted, slope):
    """Loss and gradient in float64; of the wanted token `1 - p` is what the other probabilities add up to."""
    wide = logits.double()
    losses = wide.logsumexp(1) - wide.gather(1, wanted[:, None]).squeeze(1)
    gradient = wide.softmax(1)
    gradient.scatter_(1, wanted[:, None], 0.0)
    gradient.scatter_(1, wanted[:, None], -gradient.sum(1, keepdim=True))
    return losses, gradient * slope.double()[:, None]


def found(logits, wanted, slope):
    leaf = logits.clone().requires_grad_(True)
    losses = NegativeLogLikelihood.apply(leaf, wanted)
    (gradient,) = torch.autograd.grad((losses * slope).sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("rows", [0, 1, LOGIT_ROWS - 1, LOGIT_ROWS, 2 * LOGIT_ROWS + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_loss_and_gradient(rows, dtype):
    logits, wanted = (3 * torch.randn(rows, 501)).to(dtype), torch.randint(501, (rows,))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slope = torch.rand(rows, dtype=wide)
    losses, gradient = found(logits, wanted, slope)
    want_losses, want = exact(logits, wanted, slope)
    assert losses.dtype == wide and gradient.dtype == dtype
    unit = torch.finfo(wide).eps
    torch.testing.assert_close(losses.double(), want_losses, rtol=20 * unit, atol=20 * unit)
    # exp and the sum round to some units; a narrow dtype rounds the result once more, float16 into its subnormals.
    narrow = max(torch.finfo(dtype).eps, 30 * unit)
    torch.testing.assert_close(gradient.double(), want, rtol=narrow, atol=1e-7 if dtype == torch.float16 else 1e-30)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 80.0), st.integers(0, 2**31))
def test_a_token_known_by_heart_keeps_all_digits_of_its_gradient(margin, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, wanted = torch.randn(4, 300, generator=generator), torch.randint(300, (4,), generator=generator)
    logits[torch.arange(4), wanted] += margin
    slope = torch.ones(4)
    _, gradient = found(logits, wanted, slope)
    _, want = exact(logits, wanted, slope)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-37)
