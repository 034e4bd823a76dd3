"""How state-space layers, linear attention and shared experts use their parameters: rules, against float64 autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fillm.capture import Capture, verify
from fillm.capture.combined import StackedGradients
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients
from tests.capture.small_models import HIDDEN, POSITIONS, CausalConvolution, small_model
from tests.capture.test_repeated_and_derived_uses import SAMPLES, check, kinds_seen

HEADS, WIDTH = 3, HIDDEN // 3


class SqueezedFilters(CausalConvolution):
    """The filters as fast convolutions want them: without the middle dimension, and back."""

    def forward(self, h: Tensor) -> Tensor:
        filters = self.conv.weight.squeeze(1)
        y = F.conv1d(h.transpose(1, 2), filters.unsqueeze(1), self.conv.bias, padding=2, groups=HIDDEN)
        return y[..., : h.shape[1]].transpose(1, 2)


class Selective(nn.Module):
    """A state-space layer's own: decay by channel and state, skip by channel, steps by a matrix on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay = nn.Parameter(torch.empty(HIDDEN, 4))
        self.skip = nn.Parameter(torch.empty(HIDDEN))
        self.steps = nn.Parameter(torch.empty(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        x = h.transpose(1, 2)  # [B, C, T]
        step = F.softplus(self.steps @ x)
        decay = torch.exp(-self.log_decay.float().exp()[None, :, None, :] * step[..., None])  # [B, C, T, S]
        return (decay.sum(-1) * x + x * self.skip[None, :, None]).transpose(1, 2)


class Mixed(nn.Module):
    """Vectors stored with the dimensions that they are broadcast along, and states that are broadcast too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, 1, HIDDEN))
        self.shift = nn.Parameter(torch.empty(1, HEADS, 1, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        heads = (h * self.scale).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)  # [B, heads, T, width]
        wide = heads.mean(-1, keepdim=True) + self.shift
        return torch.tanh(wide).transpose(1, 2).flatten(2)


class HeadNorm(nn.Module):
    """Every head of every token is a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        rows = h.reshape(-1, WIDTH)
        return (F.rms_norm(rows, (WIDTH,), eps=0.01) * self.weight).view_as(h)


class Stack(nn.Module):
    """Matrices that every token goes through, one way round or the other, and the gates of a diagonal of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.empty(2, HIDDEN, 5))
        self.outward = nn.Parameter(torch.empty(2, HIDDEN, 5))
        self.blocks = nn.Parameter(torch.empty(HEADS, WIDTH, WIDTH))
        self.block_bias = nn.Parameter(torch.empty(HEADS, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        rows = h.reshape(-1, HIDDEN)
        inner = torch.tanh(torch.bmm(rows.expand(2, -1, -1), self.inward))
        mixed = (inner @ self.outward.transpose(1, 2)).sum(0)
        by_block = rows.view(-1, HEADS, WIDTH).transpose(0, 1)
        gates = torch.baddbmm(self.block_bias[:, None, :], by_block, self.blocks).transpose(0, 1).reshape(-1, HIDDEN)
        return (mixed * torch.sigmoid(gates)).view_as(h)


class VectorOfPositions(nn.Module):
    """Positions that the batch shares, kept as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(POSITIONS, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.table(torch.arange(h.shape[1]))


class IndexedPositions(nn.Module):
    """Positions that are picked from their table by index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(POSITIONS, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.table[torch.arange(h.shape[1]).repeat(h.shape[0], 1)]


class AddedInPlace(nn.Module):
    """A linear layer's output to which something is added where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        y = self.linear(h)
        y += h
        return y


class Sinks(nn.Module):
    """What is joined to every sample's scores from a parameter, beside what is taken off them."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(HEADS))
        self.offset = nn.Parameter(torch.empty(HEADS))

    def forward(self, h: Tensor) -> Tensor:
        heads = h.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)  # [B, heads, T, width]
        scores = heads @ heads.transpose(2, 3)
        scores = scores.masked_fill(torch.ones(h.shape[1], h.shape[1]).triu(1).bool(), -1e4)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(h.shape[0], -1, h.shape[1], -1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), -1)[..., :-1]
        gates = torch.sigmoid(torch.logsumexp(scores, -1) - self.offset.view(1, -1, 1))
        return ((weights @ heads) * gates[..., None]).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (CausalConvolution, {"body.conv.weight": DenseGradients, "body.conv.bias": DenseGradients}),
        (SqueezedFilters, {"body.conv.weight": DenseGradients, "body.conv.bias": DenseGradients}),
        (Selective, {"body.steps": OuterGradients, "body.log_decay": DenseGradients, "body.skip": DenseGradients}),
        (Mixed, {"body.scale": DenseGradients, "body.shift": DenseGradients}),
        (HeadNorm, {"body.weight": DenseGradients}),
        (
            Stack,
            {
                "body.inward": StackedGradients,
                "body.outward": StackedGradients,
                "body.blocks": StackedGradients,
                "body.block_bias": DenseGradients,
            },
        ),
        (VectorOfPositions, {"body.table.weight": DenseGradients}),
        (IndexedPositions, {"body.table": LookupGradients}),
        (AddedInPlace, {"body.linear.weight": OuterGradients}),
        (Sinks, {"body.sinks": DenseGradients, "body.offset": DenseGradients}),
    ],
)
def test_rules_cover_these_uses_exactly(body: Callable[[], nn.Module], expected: dict[str, type]) -> None:
    model = small_model(body())
    assert check(model).fallback == {}
    seen = kinds_seen(model)
    assert {name: seen[name] for name in expected} == expected


class TimeFirst(nn.Module):
    """Sees the whole sequence, padding too, and keeps time before the batch: right one sample at a time alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        return (self.linear(h.transpose(0, 1)) + h.mean(1)).transpose(0, 1)


def test_what_no_rule_reads_in_a_batch_may_be_read_one_by_one() -> None:
    model = small_model(TimeFirst())
    together = Capture(model, ["body.linear.weight"])
    verify(together, SAMPLES)
    assert together.alone and together.fallback == {}
    check(model)
