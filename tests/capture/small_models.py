"""A small causal language model around a body that uses its parameters in one particular way."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, HIDDEN, POSITIONS = 41, 12, 32


class SmallLM(nn.Module):
    """Embedding, a causal running mean, the body, a head; the output has `.logits` as transformers' models do."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.body = body
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        h = self.embed(input_ids)
        seen = torch.arange(1, h.shape[1] + 1)[:, None]
        h = torch.tanh(h + h.cumsum(1) / seen)
        return SimpleNamespace(logits=self.head(h + self.body(h)))


def small_model(body: nn.Module, seed: int = 0) -> SmallLM:
    """A `SmallLM` with all parameters drawn anew, so that none is at a special value."""
    model = SmallLM(body).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        offset = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data = offset + 0.4 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return model


class CalledTwice(nn.Module):
    """One linear layer, one norm and one bias, each used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-6)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(self.linear(torch.tanh(self.linear(self.norm(h)))))


class Positions(nn.Module):
    """Learned positions: looked up with ids [1, T], or sliced off the parameter itself."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.sliced = sliced
        self.table = nn.Embedding(POSITIONS, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        if self.sliced:
            return torch.tanh(h + self.table.weight[: h.shape[1]])
        return torch.tanh(h + self.table(torch.arange(h.shape[1])[None]))


class LookedUpTwice(nn.Module):
    """Two lookups in one table, which has a padding entry that takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(POSITIONS, HIDDEN, padding_idx=2)

    def forward(self, h: Tensor) -> Tensor:
        t = torch.arange(h.shape[1])[None]
        return torch.tanh(h + self.table(t)) * self.table(t // 2)


class OuterAndDense(nn.Module):
    """A matrix used by a linear layer and entry by entry as well: nothing cheaper than the sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        spread = torch.tanh(h)[:, :, None, :].expand(*h.shape[:2], HIDDEN, HIDDEN)
        return F.linear(h, self.weight) + torch.tanh(spread * self.weight).sum(-1)


class Derived(nn.Module):
    """Parameters that meet the activation as something else than they are stored as."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("shifted", "raised", "softened", "minus", "columns"):
            self.register_parameter(name, nn.Parameter(torch.zeros(HIDDEN)))
        self.matrix = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
        self.other = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        h = h * (1 + self.shifted.float())
        h = self.raised.exp() * h
        h = h * self.softened.softmax(0)
        h = h + -self.minus
        h = torch.tanh(h @ self.matrix.t()) @ self.other
        return h * self.columns.view(2, -1).flip(0).reshape(-1)


class NormsAndBiases(nn.Module):
    """LayerNorm with and without affine parameters, and a linear layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.affine = nn.LayerNorm(HIDDEN)
        self.weight_only = nn.LayerNorm(HIDDEN, bias=False)
        self.plain = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        return self.weight_only(torch.tanh(self.linear(self.plain(self.affine(h)))))


class Einsum(nn.Module):
    """A contraction that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum("bti,io->bto", h, self.weight)


class CausalConvolution(nn.Module):
    """A convolution over the last three tokens, one filter a channel or one for every pair of them."""

    def __init__(self, depthwise: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, groups=HIDDEN if depthwise else 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h.transpose(1, 2), (2, 0))).transpose(1, 2)


class ProductOfParameters(nn.Module):
    """Two parameters that meet each other before they meet an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(HIDDEN))
        self.right = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return self.left * self.right * h


class WeightNorm(nn.Module):
    """A linear layer whose weight is rescaled by its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight / self.weight.norm())


class Attention(nn.Module):
    """torch's own attention layer: one call that takes four parameters and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        return self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return h * w

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return dy * w, (dy * h).sum((0, 1))


class HiddenFromTorchFunctions(nn.Module):
    """A custom autograd function: its gradient passes by no operation that can be intercepted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return _Scale.apply(h, self.scale)


class Unused(nn.Module):
    """One parameter that takes no part, one whose gradient is cut off, one that only meets no-grad code."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("idle", "cut", "frozen"):
            self.register_parameter(name, nn.Parameter(torch.zeros(HIDDEN)))

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.frozen.sigmoid()
        return h * self.cut.detach() * scale


class InPlace(nn.Module):
    """A bias added in place to a tensor that goes by another name as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        residual = x = 2.0 * h
        x += self.bias
        return torch.tanh(x) * residual


class Keywords(nn.Module):
    """Operands given by name, and a product that takes a residual along."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.zeros(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))
        self.first, self.second = (nn.Parameter(torch.zeros(HIDDEN, HIDDEN)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        h = torch.mul(torch.add(h, other=self.bias), other=self.scale)
        flat = h.reshape(-1, HIDDEN)
        return torch.addmm(flat, torch.tanh(torch.mm(flat, mat2=self.first)), self.second).view_as(h)
