"""What some configurations need beside the general rules of `small`, by model type; nested as the configuration is.

A field of value `KEEP` stays as its class has it.
"""

from typing import Any

KEEP = object()

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}
# Every kind of layer once, and what shares keys and values with another layer has one of its kind before it.
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_GEMMA3N = {
    **_SHARED_KEYS,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_ZAMBA = {"num_hidden_layers": 3} | dict.fromkeys(("layer_types", "attention_hidden_size", "attention_head_dim"), KEEP)
_DOTS3 = {
    "num_key_value_heads": 4,
    "index_n_heads": 4,
    "index_topk": 4,
    "num_hidden_layers": 3,
    "per_layer_config": {"2": {"head_dim": 12, "kv_lora_rank": 16, "q_lora_rank": 16}},
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "split_ngram_parts": 1,
    "hc_lowrank": 8,
}

CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_local_experts": 4, "n_group": 2, "topk_group": 2},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 50,
        "vocab_size": 260,
        "patch_size": 4,
        "patcher_config": {"vocab_size": 260},
        "encoder_config": {
            "vocab_size": 260,
            "hidden_size_global": 64,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
        },
        "decoder_config": {"vocab_size": 260, "hidden_size_global": 64, "num_hidden_layers": 2},
        "global_config": {"hidden_size": 64, "head_dim": 16},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {kind: _ROTARY for kind in ("sliding_attention", "full_attention")},
    },
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": KEEP, "layer_types": KEEP},
    "hunyuan_v1_dense": {"head_dim": 8, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"head_dim": 8, "num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 48,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "mode": "inference"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"], **_ZAMBA},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        **_ZAMBA,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Classes that are no language model by themselves.
NOT_ALONE: dict[str, str] = {
    "gemma4_assistant": "drafts for another model, whose hidden states and keys are its input",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states and keys are its input",
    "musicgen": "speaks several codebooks at once, not tokens; its class does not take its own configuration",
    "musicgen_melody": "speaks several codebooks at once, not tokens; its class does not take its own configuration",
}
