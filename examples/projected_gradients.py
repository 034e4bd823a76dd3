"""A store of projected per-sample gradients and the attribution scores of TRAK (Park et al., arXiv 2303.14186) on it.

    python examples/projected_gradients.py

A gradient of every training sample, of all layers together, is sketched to k numbers while the batch is at hand and
written to a memory-mapped [n, k] file; no gradient is ever formed. A sketch is linear, so the sketches of the layers,
each with a seed of its own, add up to the sketch of the whole gradient. Then

    tau(test, i) = phi_test (Phi^T Phi)^-1 phi_i

for the rows phi_i of the store Phi: one model of TRAK's ensemble. TRAK takes gradients of log(p / (1 - p)), p the
probability of the label, and a factor 1 - p_i of each training sample; here stand gradients of the loss itself, which
for a sample of one row are -(1 - p) times TRAK's.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import fillm_kernels as fk
import numpy as np
import torch
from fillm_kernels.seed_law import tensor_seed
from torch import Tensor, nn

Losses = Callable[[Tensor, Tensor], Tensor]


class LinearLog:
    """Inputs and output gradients of a model's linear layers during one forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.inputs: dict[str, Tensor] = {}  # [N, I]
        self.gradients: dict[str, Tensor] = {}  # [N, O]
        self._handles = [layer.register_forward_hook(self._recorder(name)) for name, layer in self.layers.items()]

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def record(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            self.inputs[name] = args[0].detach()
            output.register_hook(lambda dy: self.gradients.__setitem__(name, dy.detach()))

        return record

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()


def projected(model: nn.Module, x: Tensor, target: Tensor, losses_of: Losses, offsets: Tensor, dim: int) -> Tensor:
    """Sketches of the samples' gradients of all linear weights together.

    Args:
        model: bias-free linear layers with anything parameter-free between them.
        x: rows of all samples one after another, [N, features].
        target: what `losses_of` needs.
        losses_of: (output, target) -> a loss per row, [N]; a sample's loss is the sum over its rows.
        offsets: where each sample's rows begin, and N, [B + 1].
        dim: k.

    Returns:
        [B, k], in the unit of the gradients.
    """
    log, x = LinearLog(model), x.detach().requires_grad_(True)
    try:
        losses_of(model(x), target).sum().backward(inputs=[x])  # `.grad` of a weight is never formed
    finally:
        log.close()
    parts = [
        fk.outer_sketch(log.inputs[name], log.gradients[name], offsets, dim, seed=tensor_seed(0, name))
        for name in log.layers
    ]
    return torch.stack(parts).sum(0)


def write_store(path: Path, blocks: Iterable[Tensor], samples: int, dim: int) -> None:
    """Writes blocks of sketches one after another to a .npy file that is never whole in memory.

    Args:
        path: of the file.
        blocks: [b, k] each, in the order of the samples.
        samples: n, how many there are in all.
        dim: k.
    """
    store = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(samples, dim))
    begin = 0
    for block in blocks:
        store[begin : begin + len(block)] = block.numpy()
        begin += len(block)
    store.flush()


def scores(path: Path, test: Tensor, block: int = 1024) -> Tensor:
    """TRAK's `phi_test (Phi^T Phi)^-1 Phi^T`, with two reads of the store.

    Args:
        path: what `write_store` wrote, [n, k].
        test: sketches of test gradients, [m, k].
        block: rows read at a time.

    Returns:
        [m, n], float32.
    """
    store = np.load(path, mmap_mode="r")
    kernel = torch.zeros(store.shape[1], store.shape[1], dtype=torch.float64)
    for begin in range(0, len(store), block):
        phi = torch.from_numpy(store[begin : begin + block].astype(np.float64))
        kernel += phi.T @ phi
    # A little of the mean curvature keeps the system solvable when there are fewer samples than numbers.
    kernel += 1e-3 * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
    directions = torch.linalg.solve(kernel, test.double().T)  # [k, m]
    out = torch.empty(len(test), len(store))
    for begin in range(0, len(store), block):
        phi = torch.from_numpy(store[begin : begin + block].astype(np.float64))
        out[:, begin : begin + block] = (phi @ directions).T.float()
    return out


def gradients_one_by_one(
    model: nn.Module, x: Tensor, target: Tensor, losses_of: Losses, offsets: Tensor
) -> Tensor:  # fmt: skip
    """The same gradients by autograd, a sample at a time, [B, P]: what the store stands for."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    rows = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        loss = losses_of(model(x[begin:end]), target[begin:end]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def losses_of(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of every row."""
    return nn.functional.cross_entropy(output, target, reduction="none")


def some_training(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> None:
    """A few steps only: a finished model's gradients say little."""
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        losses_of(model(x), target).mean().backward()
        optimiser.step()
    optimiser.zero_grad()


def main() -> None:
    """Which training samples speak for a test sample, of samples of three rows in eight classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96, bias=False), nn.Tanh(), nn.Linear(96, 64, bias=False), nn.Tanh(),
                          nn.Linear(64, 8, bias=False))  # fmt: skip
    samples, tests, tokens, classes, dim, at_a_time = 240, 16, 3, 8, 1024, 60
    label = torch.arange(samples + tests) % classes
    target = label.repeat_interleave(tokens)
    x = 2 * torch.randn(classes, 32)[target] + 2 * torch.randn(len(target), 32)
    offsets = torch.arange(0, len(target) + 1, tokens)
    some_training(model, x[: samples * tokens], target[: samples * tokens], steps=5)

    def block(first: int, last: int) -> Tensor:
        rows = slice(first * tokens, last * tokens)
        return projected(model, x[rows], target[rows], losses_of, offsets[: last - first + 1], dim)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phi.npy"
        write_store(path, (block(at, at + at_a_time) for at in range(0, samples, at_a_time)), samples, dim)
        phi = torch.from_numpy(np.load(path))
        found = scores(path, block(samples, samples + tests))

    exact = gradients_one_by_one(model, x, target, losses_of, offsets)[:samples]
    share = phi.nbytes / exact.nbytes
    print(f"store of {samples} x {dim} numbers for gradients of {exact.shape[1]}: {share:.0%} of them")
    norms = exact.norm(dim=1)
    off = ((phi @ phi.T - exact @ exact.T) / (norms[:, None] * norms)).square().mean().sqrt()
    print(f"inner products are off by {off:.3f} |g| |h|; a sketch to {dim} may be by {(2 / dim) ** 0.5:.3f}")
    best = found.topk(10, dim=1).indices
    agree = (label[best] == label[samples:, None]).float().mean()
    print(f"of the ten samples that speak most for a test sample {agree:.0%} are of its class; by chance 12 %")
    print(f"their classes for the first one, of class {int(label[samples])}: {label[best[0]].tolist()}")


if __name__ == "__main__":
    main()
