"""A model without its weights: its configuration on the meta device, which is all that a plan reads."""

import warnings

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fillm.errors import ModelError
from fillm.models import DTYPES, imported_peft, quiet_transformers
from fillm.rank.config import RankConfig


def meta_model(config: RankConfig) -> nn.Module:
    """The model without its weights."""
    try:
        with quiet_transformers():
            settings = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
            dtype = (
                (getattr(settings, "dtype", None) or torch.float32) if config.dtype == "auto" else DTYPES[config.dtype]
            )
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    settings, dtype=dtype, trust_remote_code=config.trust_remote_code
                )
                return model if config.adapter is None else _with_adapter(model, config.adapter)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config.model}: its configuration cannot be read: {' '.join(str(error).split())}") from None


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    peft = imported_peft(f"--adapter {adapter}:")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft reads what transformers has deprecated
        return peft.get_peft_model(model, peft.PeftConfig.from_pretrained(adapter))
