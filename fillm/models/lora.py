"""New low-rank adapters in a model."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fillm.models.loading import imported_peft


def with_lora(model: nn.Module, rank: int, seed: int, targets: str | Sequence[str] = "all-linear") -> Any:
    """Puts untrained adapters around a model's linear layers; they alone require grad, in float32.

    Args:
        model: changed in place, its own weights frozen.
        rank: of the adapters; `alpha` is twice that.
        seed: of their first weights.
        targets: paths of the modules, or `all-linear` for all but the head.

    Returns:
        The `peft.PeftModel` around it.

    Raises:
        ModelError: without the package peft.
    """
    peft = imported_peft("--lora-rank")
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads what transformers has deprecated
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, settings)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped
