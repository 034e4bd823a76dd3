"""Any causal-LM configuration made small, and a model of it with random weights."""

import re
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures.exceptions import CHANGES, KEEP, NOT_ALONE

VOCABULARY = 64
LAYERS = 2
LARGEST_PARAMETERS = 20_000_000  # what is larger was not made small

# The first pattern that matches a field's whole name gives its value; heads times their width is the hidden size.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|text_vocab_size|.*_vocab_size|vocab_size_.*", VOCABULARY),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    (r"(num_hidden_layers|n_layers?|num_layers|num_blocks|depth|(num_)?(en|de)coder_layers|num_layers_.*)", LAYERS),
    (r".*num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|num_key_value_heads_.*|num_query_groups", 2),
    (r"(en|de)coder_attention_heads|.*num_(attention_)?heads|n_heads?|num_heads_.*|attention_heads", 4),
    (r"rotary_dim|.*qk_rope_head_dim", 4),
    (r".*(head_dim|head_size)|attention_key_size|d_kv|dim_head|qk_channels|v_channels", 8),
    (r".*_lora_rank|.*lora_dim|low_rank_.*", 8),
    (r".*intermediate_size.*|(en|de)coder_ffn_dim|ffn_dim|d_ff|n_inner|inner_dim|d_inner|ffn_hidden_size|dim_ff", 48),
    (r".*(hidden_size|hidden_dim)|d_model|n_embd|dim|emb_dim|embedding_size|word_embed_proj_dim|embed_dim", 32),
    (
        r"max_(position_embeddings|seq_len|sequence_length|context_len.*)|n_positions|n_ctx|context_length|.*max_position.*",
        64,
    ),
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_topk|num_experts_per_token", 2),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"n_group|topk_group", 1),
    (r"sliding_window(_size)?|attention_window|local_attention|window_size|attention_window_size", 6),
    (r"attention_chunk_size", 8),
    (r"chunk_size|mamba_chunk_size", 4),
    (r"(mamba_d_|ssm_)?state(_size)?|mamba_d_state|state_size|ssm_state_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"lru_width", 32),
    (r"image_size", 28),
    (r"patch_size", 14),
)


def causal_lm_types() -> list[str]:
    """The model types whose configuration has a causal-LM class, in the order of their names."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES)


def small_config(model_type: str) -> PretrainedConfig:
    """The configuration of a model type with two layers (one of each kind that it alternates) of width 32.

    Raises:
        ValueError: if its class is no language model by itself.
    """
    if model_type in NOT_ALONE:
        raise ValueError(NOT_ALONE[model_type])
    config_class = type(transformers.AutoConfig.for_model(model_type))
    return _shrunk(config_class, CHANGES.get(model_type, {}))


def _shrunk(config_class: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    default = config_class()
    parts = getattr(config_class, "sub_configs", {})
    small: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name in parts:
            if isinstance(value, PretrainedConfig):
                small[name] = _shrunk(type(value), changes.get(name, {}))
        elif not name.startswith("_") and isinstance(value, int) and not isinstance(value, bool):
            if name == "qk_head_dim":  # the sum of two others
                continue
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                small[name] = size
    if "qk_rope_head_dim" in small:  # latent attention: a key for every head, and the rotary part's width
        small |= {name: size for name, size in (("num_key_value_heads", 4), ("head_dim", 4)) if name in small}
    small |= _layer_kinds(vars(default))
    if hasattr(default, "is_decoder"):
        small["is_decoder"] = True
    small |= {name: value for name, value in changes.items() if name not in parts}
    return config_class(**{name: value for name, value in small.items() if value is not KEEP})


def _layer_kinds(fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of every kind in the lists that name the layers' kinds; two layers where there is no such list."""
    kinds = {name: list(value) for name, value in fields.items() if name.endswith("layer_types") and value}
    if not kinds:
        return {}
    combinations = list(dict.fromkeys(zip(*kinds.values(), strict=False)))
    while len(combinations) < LAYERS:
        combinations.append(combinations[-1])
    columns = zip(*combinations, strict=True)
    counted = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in fields)
    return {counted: len(combinations), **{name: list(column) for name, column in zip(kinds, columns, strict=True)}}


def small_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The causal-LM class of a model type, small, in float32 and eval mode.

    Matrices are drawn from N(0, 0.2^2); vectors stay as their class makes them, plus N(0, 0.1^2), so that no norm's or
    bias's gradient is degenerate.

    Raises:
        ValueError: if the class is no language model by itself, or the configuration was not made small.
    """
    config = small_config(model_type)
    with torch.device("meta"):
        count = sum(p.numel() for p in _of_config(config).parameters())
    if count > LARGEST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(seed)
    model = _of_config(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = 0.2 * noise
        else:
            value = parameter.data.float()
            parameter.data = torch.where(value.abs() < 100.0, value, 0.0) + 0.1 * noise
    return model.float().eval()


def _of_config(config: PretrainedConfig) -> PreTrainedModel:
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kinds)
