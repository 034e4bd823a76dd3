"""Differentially private SGD with ghost clipping: per-sample gradients are clipped and summed without being formed.

    python examples/ghost_clipping.py

The squared norm of a sample's gradient is a sum over weights and biases of `ghost_norm`, the clipped sum a
`weighted_outer_` with the clip factors as weights (Goodfellow 2015, arXiv 1510.01799; Li et al., arXiv 2110.05679).
One forward and one backward pass; a sample may have any number of rows (tokens). A bias is a weight on an input that is
always 1. Neither the privacy account nor the random choice of the batch, which it rests on, is made here.
"""

from collections import Counter
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
        if layer in self.inputs:
            raise ValueError(f"{layer} runs twice: the norm of its gradient is not that of its parts")
        self.inputs[layer] = args[0].detach()
        output.register_hook(lambda dy: self.gradients.__setitem__(layer, dy.detach()))

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


def clipped_gradients(
    model: nn.Module, x: Tensor, losses_of: Losses, target: Tensor, offsets: Tensor, max_norm: float
) -> tuple[dict[nn.Parameter, Tensor], Tensor]:
    """The sum over samples of gradients clipped to `max_norm`, and the norms before.

    Args:
        model: linear layers, each run once on [N, I], and nothing else that is trained.
        x: rows of all samples one after another, [N, features].
        losses_of: (output, target) -> a loss per row, [N]; a sample's loss is the sum over its rows.
        target: what `losses_of` needs.
        offsets: where each sample's rows begin, and N, [B + 1].
        max_norm: clipping bound.

    Returns:
        For every trained weight and bias the clipped sum, of its shape; gradient norms of the samples, [B].

    Raises:
        ValueError: if a gradient would be left out of the norm, and so escape the clipping.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    uses = Counter(parameter for layer in layers for parameter in (layer.weight, layer.bias))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and uses[parameter] != 1:
            raise ValueError(f"{name} does not belong to exactly one nn.Linear: its gradient would escape the clipping")
    log, x = LinearLog(layers), x.detach().requires_grad_(True)
    try:
        losses_of(model(x), target).sum().backward(inputs=[x])  # `.grad` of a parameter is never formed
    finally:
        log.close()
    # Input and output gradient of every trained parameter.
    seen: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
    for layer, dy in log.gradients.items():
        for parameter, rows in ((layer.weight, log.inputs[layer]), (layer.bias, dy.new_ones(len(dy), 1))):
            if parameter is not None and parameter.requires_grad:
                seen[parameter] = rows, dy
    norms = torch.stack([fk.ghost_norm(rows, dy, offsets) for rows, dy in seen.values()]).sum(0).sqrt()
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    sums = {}
    for parameter, (rows, dy) in seen.items():
        sums[parameter] = torch.zeros_like(parameter)
        fk.weighted_outer_(sums[parameter].view(dy.shape[1], -1), rows, dy, factors, offsets)
    return sums, norms


def main() -> None:
    """A few private steps on a toy regression."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    x, samples = torch.randn(320, 20), 64
    target, offsets = x[:, :3].sum(1, keepdim=True).tanh(), torch.arange(0, 321, 320 // samples)
    max_norm, noise, lr = 8.0, 0.5, 0.02
    generator = torch.Generator().manual_seed(1)

    def losses_of(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    for step in range(20):
        sums, norms = clipped_gradients(model, x, losses_of, target, offsets, max_norm)
        with torch.no_grad():
            for parameter, total in sums.items():
                total += noise * max_norm * torch.randn(total.shape, generator=generator)
                parameter -= lr * total / samples
        if step % 5 == 0 or step == 19:
            clipped = float((norms > max_norm).float().mean())
            mean = float(losses_of(model(x), target).mean().detach())
            print(f"step {step:2d}  loss {mean:.4f}  {100 * clipped:.0f} % of samples clipped")


if __name__ == "__main__":
    main()
