"""The diagonal Fisher matrix of elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796), exactly.

    python examples/diagonal_fisher.py

Many codes square the gradient of a batch, which is not the Fisher diagonal: samples must be squared before they are
summed. `sample_moments` forms every sample's gradient tile by tile, squares it and drops it.
"""

import fillm_kernels as fk
import torch
from torch import Tensor, nn


def fisher_diagonal(layer: nn.Linear, x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """`(1/B) sum_b G_b^2` of one layer's weight.

    Args:
        layer: the layer.
        x: its inputs, samples one after another, [N, I].
        dy: gradients of each sample's own log-likelihood at its output, [N, O].
        offsets: where each sample begins, and N, [B + 1].

    Returns:
        [O, I].
    """
    fisher = torch.zeros_like(layer.weight)
    fk.sample_moments(x, dy, offsets, second=fisher, alpha=1.0 / (len(offsets) - 1))
    return fisher.detach()


def main() -> None:
    """Consolidates one layer: which weights a second task should leave alone."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 10)
    x = torch.randn(256, 32) * torch.linspace(0.1, 2.0, 32)  # later inputs matter more
    log_probabilities = layer(x).log_softmax(1)
    labels = torch.distributions.Categorical(logits=log_probabilities.detach()).sample()
    # Rows of a batch do not meet, so the gradient of the sum at the outputs is each sample's own.
    dy = nn.functional.one_hot(labels, 10).float() - log_probabilities.detach().exp()
    fisher = fisher_diagonal(layer, x, dy, torch.arange(257))
    of_batch = ((dy.T @ x) / 256).square()
    print(f"mean Fisher entry {fisher.mean():.4f}; of the squared batch gradient {of_batch.mean():.6f}")
    print("by input, first and last:", ", ".join(f"{v:.4f}" for v in fisher.mean(0)[[0, -1]].tolist()))


if __name__ == "__main__":
    main()
