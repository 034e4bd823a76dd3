"""The losses that say how far forgetting has come: each sample's own, dealt out to the processes."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from fillm.capture import frozen, sample_losses
from fillm.data import SampleSet, collate
from fillm.runs.processes import Processes


def arithmetic(device: torch.device, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """The type that a forward pass computes in; None is that of the weights."""
    return contextlib.nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)


def evaluate(
    model: nn.Module, samples: SampleSet, processes: Processes, batch_size: int, autocast: torch.dtype | None = None
) -> Tensor:
    """Every sample's mean negative log-likelihood over its answer tokens; the model in eval mode.

    Args:
        model: a causal language model.
        samples: at least one; each process takes some of its batches, all receive the result.
        processes: of the run.
        batch_size: samples of one forward pass of this process.
        autocast: see `arithmetic`.

    Returns:
        [samples] float64, on the CPU, in nats a token; the same numbers in every process.
    """
    losses = torch.zeros(len(samples), dtype=torch.float64)
    lengths = samples.lengths
    order = sorted(range(len(samples)), key=lengths.__getitem__)
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    error: Exception | None = None
    try:
        with frozen(model), torch.no_grad(), arithmetic(processes.device, autocast):
            for chosen in processes.share(batches):
                batch = collate(samples, chosen).to(processes.device)
                losses[chosen] = sample_losses(model, batch).double().cpu()
    except Exception as caught:  # raised where all processes are: they would wait for this one's losses
        error = caught
    processes.meet(error=error)
    return processes.add_up_in_order(losses)
