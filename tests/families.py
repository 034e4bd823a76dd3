"""Tiny, randomly initialised models of every supported family, built from their configs without a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 97
HIDDEN = 32
MAX_POSITIONS = 128

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    **_IDS,
}
_EXPERTS = {"num_experts_per_tok": 2}


def _like_llama(config: str, **changes: Any) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: getattr(transformers, config)(**{**_LLAMA_LIKE, **changes})


def _gpt2() -> transformers.PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=MAX_POSITIONS, n_embd=HIDDEN, n_layer=2, n_head=4, n_inner=56, **_IDS
    )


def _gpt_neox() -> transformers.PretrainedConfig:
    shared = {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**shared)


def _opt() -> transformers.PretrainedConfig:
    return transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        **_IDS,
    )


_BUILDERS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": _like_llama("LlamaConfig"),
    "llama-tied": _like_llama("LlamaConfig", tie_word_embeddings=True),
    "llama-bias": _like_llama("LlamaConfig", attention_bias=True, mlp_bias=True),
    "qwen2": _like_llama("Qwen2Config"),
    "qwen3": _like_llama("Qwen3Config", head_dim=8),
    "mistral": _like_llama("MistralConfig", head_dim=8),
    "gemma2": _like_llama(
        "Gemma2Config", head_dim=8, query_pre_attn_scalar=8, sliding_window=16, tie_word_embeddings=True
    ),
    "phi": _like_llama("PhiConfig", partial_rotary_factor=0.5),
    "phi3": _like_llama("Phi3Config"),
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
    "opt": _opt,
    "olmo2": _like_llama("Olmo2Config"),
    "mixtral": _like_llama("MixtralConfig", intermediate_size=24, num_local_experts=4, **_EXPERTS),
    "qwen3-moe": _like_llama(
        "Qwen3MoeConfig", head_dim=8, moe_intermediate_size=24, num_experts=4, norm_topk_prob=True, **_EXPERTS
    ),
}

FAMILIES: tuple[str, ...] = tuple(_BUILDERS)


def build_family(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of one family in eval mode, its parameters not requiring grad.

    Matrices are drawn from N(0, 0.2^2); norms and biases from N(default, 0.1^2), so that no tensor's gradient is
    degenerate. The values are drawn in float64 and rounded, so every dtype holds the same model.

    Args:
        name: one of `FAMILIES`.
        seed: seed of the weights; the global random state is left as it was.
        dtype: dtype of every parameter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            _BUILDERS[name](), attn_implementation="eager", experts_implementation="eager"
        )
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            value = 0.2 * noise
        else:
            plain_norm = parameter_name.endswith("weight") and name != "gemma2"
            value = 0.1 * noise + (1.0 if plain_norm else 0.0)
        parameter.data = value.to(dtype)
        parameter.requires_grad_(False)
    return model.to(dtype).eval()


def build_lora(name: str, target_modules: list[str], rank: int = 3, seed: int = 0) -> peft.PeftModel:
    """A family's tiny model with low-rank adapters whose both factors are random (a fresh adapter's B is zero)."""
    with warnings.catch_warnings():
        # peft reads a property that transformers has deprecated.
        warnings.filterwarnings("ignore", category=FutureWarning)
        config = peft.LoraConfig(r=rank, target_modules=target_modules, task_type="CAUSAL_LM")
        model = peft.get_peft_model(build_family(name, seed), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return model.eval()
