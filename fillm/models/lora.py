"""New low-rank adapters in a model."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fillm.errors import UsageError
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
        UsageError: the rank is larger than that of any matrix that would be adapted.
    """
    peft = imported_peft("--lora-rank")
    largest = max(
        (_rank(module) for name, module in model.named_modules() if _is_adapted(name, module, targets)), default=0
    )
    if rank > largest > 0:
        raise UsageError(f"--lora-rank {rank}: no matrix here has a rank above {largest}; give a small one, such as 8")
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


def _is_adapted(name: str, module: nn.Module, targets: str | Sequence[str]) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and (isinstance(targets, str) or name in targets)


def _rank(module: nn.Module) -> int:
    """The most that a layer's matrix can have; of one in 4 bits the weight's own shape says nothing."""
    return int(
        min(module.in_features, module.out_features) if isinstance(module, nn.Linear) else min(module.weight.shape)
    )
