"""Under torchrun: the gradient of a step, formed by all processes; each writes what it has to FOLDER/<its number>."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fillm.runs import processes
from fillm.runs.processes import Processes
from fillm.unlearn.gradients import StepGradients
from fillm.unlearn.losses import make_loss
from fillm.unlearn.sources import Sources
from tests.families import build_family
from tests.unlearn.test_command_pieces import NAMES, drawn_samples

LOSSES = ("grad-diff", "simnpo", "wga")
FORGET, RETAIN = list(range(7)), list(range(2, 9))  # no multiple of the processes
REACHES = [frozenset(NAMES[:1]), frozenset(NAMES), frozenset(NAMES[1:])] * 3


def gradients(running: Processes, micro_batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """By loss and tensor, and both sums of the values, of all samples with one mask and with masks of their own."""
    found = {}
    for name in LOSSES:
        for reaches in (None, REACHES):
            torch.manual_seed(0)
            model = build_family("llama").to(dtype).requires_grad_(False)
            for tensor in NAMES:
                model.get_parameter(tensor).requires_grad_(True)
            sources = Sources(drawn_samples(9, 1), drawn_samples(11, 2))
            forming = StepGradients(model, make_loss(name), sources, running, micro_batch, None, reaches)
            sums = forming.form(FORGET, RETAIN, 1, print)
            case = f"{name}, {'a mask' if reaches is None else 'masks'}"
            found[f"{case}: sums"] = torch.tensor(sums, dtype=torch.float64)
            found |= {f"{case}: {tensor}": parameter.grad for tensor, parameter in forming.parameters.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes._BLOCK = 100
    running = Processes("cpu")
    with running.together():
        save_file(gradients(running, -(-8 // running.count), torch.float32), Path(sys.argv[1]) / str(running.index))
