"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796) with the exact diagonal Fisher matrix.

    python examples/diagonal_fisher.py

Many codes square the gradient of a batch, which is not the Fisher diagonal: samples must be squared before they are
summed. `sample_moments` forms every sample's gradient tile by tile, squares it and drops it. A bias is the weight of an
input that is always 1.
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
    return fisher


def train(layer: nn.Linear, x: Tensor, labels: Tensor, old: Tensor, precision: Tensor | float) -> None:
    """Cross entropy of a task plus `1/2 sum precision (w - old)^2`."""
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        penalty = 0.5 * (precision * (layer.weight - old).square()).sum()
        (nn.functional.cross_entropy(layer(x), labels) + penalty).backward()
        optimiser.step()


def main() -> None:
    """Two tasks of one layer: what is left of the first when the second has been learnt."""
    torch.manual_seed(0)
    features, classes, samples = 32, 10, 512
    tasks = []
    for scale in (torch.linspace(2.0, 0.1, features), torch.linspace(0.1, 2.0, features)):
        x = torch.randn(samples, features) * scale  # the tasks look at different inputs, and share some
        tasks.append((x, (x @ torch.randn(features, classes)).argmax(1)))
    layer = nn.Linear(features, classes, bias=False)
    train(layer, *tasks[0], layer.weight.detach().clone(), 0.0)
    learnt = layer.weight.detach().clone()

    x = tasks[0][0]
    with torch.no_grad():
        log_probabilities = layer(x).log_softmax(1)
    # The Fisher matrix takes labels from the model, not from the data. Rows of a batch do not meet, so the gradient of
    # the sum at the outputs is each sample's own.
    labels = torch.distributions.Categorical(logits=log_probabilities).sample()
    dy = nn.functional.one_hot(labels, classes).float() - log_probabilities.exp()
    fisher = fisher_diagonal(layer, x, dy, torch.arange(samples + 1))
    of_batch = ((dy.T @ x) / samples).square()
    print(f"mean Fisher entry {fisher.mean():.4f}; of the squared batch gradient {of_batch.mean():.6f}")

    for name, precision in (("nothing kept", 0.0), ("all weights alike", 3 * fisher.mean()), ("Fisher", 3 * fisher)):
        with torch.no_grad():
            layer.weight.copy_(learnt)
        train(layer, *tasks[1], learnt, precision)
        right = [float((layer(x).argmax(1) == labels).float().mean()) for x, labels in tasks]
        print(f"{name:<18} first task {right[0]:.0%} right, second {right[1]:.0%}")


if __name__ == "__main__":
    main()
