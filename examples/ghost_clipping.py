"""Differentially private SGD with ghost clipping: per-sample gradients are clipped and summed without being formed.

    python examples/ghost_clipping.py

For linear layers the squared norm of a sample's gradient is a sum over layers of `ghost_norm`, and the clipped sum a
`weighted_outer_` with the clip factors as weights (Goodfellow 2015, arXiv 1510.01799; Li et al., arXiv 2110.05679).
One forward and one backward pass; a sample may have any number of rows (tokens). The privacy account is not kept here.
"""

from collections.abc import Callable, Sequence

import fillm_kernels as fk
import torch
from torch import Tensor, nn

Losses = Callable[[Tensor, Tensor], Tensor]


class LinearLog:
    """Inputs and output gradients of a model's linear layers during one forward and backward."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.inputs: dict[nn.Linear, Tensor] = {}  # [N, I]
        self.gradients: dict[nn.Linear, Tensor] = {}  # [N, O]
        self._handles = [layer.register_forward_hook(self._record) for layer in layers]

    def _record(self, layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        self.inputs[layer] = args[0].detach()
        output.register_hook(lambda dy: self.gradients.__setitem__(layer, dy.detach()))

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


def clipped_gradients(
    model: nn.Module, x: Tensor, losses_of: Losses, target: Tensor, offsets: Tensor, max_norm: float
) -> tuple[dict[nn.Linear, Tensor], Tensor]:
    """The sum over samples of gradients clipped to `max_norm`, and the norms before.

    Args:
        model: bias-free linear layers with anything parameter-free between them.
        x: rows of all samples one after another, [N, features].
        losses_of: (output, target) -> a loss per row, [N]; a sample's loss is the sum over its rows.
        target: what `losses_of` needs.
        offsets: where each sample's rows begin, and N, [B + 1].
        max_norm: clipping bound.

    Returns:
        For every linear layer the clipped sum, [O, I]; gradient norms of the samples, [B].
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    log = LinearLog(layers)
    try:
        for layer in layers:
            layer.weight.requires_grad_(False)  # `.grad` is never formed
        losses_of(model(x.detach().requires_grad_(True)), target).sum().backward()
    finally:
        log.close()
        for layer in layers:
            layer.weight.requires_grad_(True)
    squares = [fk.ghost_norm(log.inputs[layer], log.gradients[layer], offsets) for layer in layers]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    sums = {}
    for layer in layers:
        out = torch.zeros_like(layer.weight)
        sums[layer] = fk.weighted_outer_(out, log.inputs[layer], log.gradients[layer], factors, offsets)
    return sums, norms


def main() -> None:
    """A few private steps on a toy regression."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64, bias=False), nn.Tanh(), nn.Linear(64, 1, bias=False))
    x, samples = torch.randn(320, 20), 64
    target, offsets = x[:, :3].sum(1, keepdim=True).tanh(), torch.arange(0, 321, 320 // samples)
    max_norm, noise, lr = 1.0, 0.5, 0.1
    generator = torch.Generator().manual_seed(1)

    def losses_of(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    for step in range(20):
        sums, norms = clipped_gradients(model, x, losses_of, target, offsets, max_norm)
        with torch.no_grad():
            for layer, total in sums.items():
                total += noise * max_norm * torch.randn(total.shape, generator=generator)
                layer.weight -= lr * total / samples
        if step % 5 == 0 or step == 19:
            clipped = float((norms > max_norm).float().mean())
            mean = float(losses_of(model(x), target).mean().detach())
            print(f"step {step:2d}  loss {mean:.4f}  {100 * clipped:.0f} % of samples clipped")


if __name__ == "__main__":
    main()
