"""The tiny configurations: each family, and the variants that catch what a single one would not."""

from __future__ import annotations

from typing import Any

from oracle.reference import VOCAB, Spec, call_it_kimi, transpose_experts

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
BASE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {
    **BASE,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "head_dim": 16,
}
MLA = {
    **BASE,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
MLA_YARN = {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}
DSA = {
    **{key: value for key, value in MLA.items() if key not in ("n_group", "topk_group")},
    "n_shared_experts": 1,
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "mlp_layer_types": ["dense", "sparse"],
}
SWITCH = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "num_experts": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "relative_attention_max_distance": 20,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
GPT_OSS: dict[str, Any] = {
    **BASE,
    "head_dim": 16,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "swiglu_limit": 0.8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 300.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}
JAMBA = {
    **BASE,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}


VISION: tuple[str, str, dict[str, Any]] = (
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLMoeConfig",
    {
        "text_config": {
            **QWEN,
            "vocab_size": VOCAB,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
)


def causal(prefix: str, values: dict[str, Any], **more: Any) -> Spec:
    return Spec(f"{prefix}ForCausalLM", f"{prefix}Config", values, **more)


SPECS: dict[str, Spec] = {
    "llama": causal(
        "Llama",
        {
            **BASE,
            "intermediate_size": 48,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama-biases": causal(
        "Llama",
        {**BASE, "intermediate_size": 48, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "gpt2": Spec(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mixtral": causal("Mixtral", {**BASE, "intermediate_size": 24, "num_local_experts": 4, "head_dim": 16}),
    "mixtral-window": causal("Mixtral", {**BASE, "intermediate_size": 24, "num_local_experts": 4, "sliding_window": 4}),
    "qwen2_moe": causal(
        "Qwen2Moe",
        {
            **{key: value for key, value in QWEN.items() if key != "head_dim"},
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 4,
            "mlp_only_layers": [0],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen2_moe-window": causal(
        "Qwen2Moe",
        {
            **{key: value for key, value in QWEN.items() if key != "head_dim"},
            "shared_expert_intermediate_size": 40,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": causal("Qwen3Moe", {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3}),
    "qwen3_moe-biases": causal(
        "Qwen3Moe", {**QWEN, "norm_topk_prob": False, "attention_bias": True, "decoder_sparse_step": 2}
    ),
    "qwen3_next": causal(
        "Qwen3Next",
        {
            **QWEN,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "olmoe": causal(
        "Olmoe", {**BASE, "intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.8}
    ),
    "olmoe-renormalized": causal(
        "Olmoe", {**BASE, "intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}
    ),
    "deepseek_v2": causal(
        "DeepseekV2",
        {
            **MLA,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "rope_parameters": MLA_YARN,
            "attention_bias": True,
        },
    ),
    "deepseek_v2-lite": causal(
        "DeepseekV2",
        {**MLA, "q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None},
    ),
    "deepseek_v3": causal("DeepseekV3", {**MLA, "rope_parameters": MLA_YARN}),
    "deepseek_v3-fp8": causal(
        "DeepseekV3", {**MLA, "intermediate_size": 200, "moe_intermediate_size": 136}, quantization="fp8"
    ),
    "deepseek_v3-plain": causal(
        "DeepseekV3",
        {
            **MLA,
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": True,
        },
    ),
    "deepseek_v32": causal("DeepseekV32", {**DSA, "n_group": 4, "topk_group": 2, "rope_parameters": MLA_YARN}),
    "glm_moe_dsa": causal(
        "GlmMoeDsa",
        {
            **DSA,
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "indexer_types": ["full", "shared", "full", "shared"],
        },
    ),
    "glm4_moe": causal(
        "Glm4Moe",
        {
            **BASE,
            "head_dim": 16,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "dbrx": Spec(
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"clip_qkv": 0.7, "kv_n_heads": 2, "rope_theta": 5e5},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3, "hidden_size": 32},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "pad_token_id": 0,
        },
    ),
    "gpt_oss": causal("GptOss", GPT_OSS),
    "gpt_oss-mxfp4": causal("GptOss", GPT_OSS, quantization="mxfp4"),
    "phimoe": causal(
        "Phimoe",
        {
            **BASE,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "attention_bias": True,
            "lm_head_bias": True,
            "router_jitter_noise": 0.3,
        },
    ),
    "phimoe-longrope": causal(
        "Phimoe",
        {
            **BASE,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "sliding_window": 5,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "short_mscale": 1.2,
                "long_mscale": 1.4,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "granitemoe": causal(
        "GraniteMoe",
        {
            **BASE,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "embedding_multiplier": 1.7,
            "logits_scaling": 0.6,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "tie_word_embeddings": True,
        },
    ),
    "minimax": causal(
        "MiniMax",
        {
            **BASE,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "block_size": 5,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "full_attn_alpha_factor": 1.3,
            "full_attn_beta_factor": 0.7,
            "linear_attn_alpha_factor": 1.2,
            "linear_attn_beta_factor": 0.8,
            "mlp_alpha_factor": 1.1,
            "mlp_beta_factor": 0.9,
        },
    ),
    "minimax_m2": causal(
        "MiniMaxM2",
        {
            **BASE,
            "head_dim": 16,
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        },
    ),
    "llama4_text": Spec(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **BASE,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 6,
            "floor_scale": 4,
            "attn_scale": 0.3,
        },
        padding="alone",
        note="the query temperature counts padding as positions",
    ),
    "llama4_text-plain": Spec(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **BASE,
            "head_dim": 16,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "no_rope_layers": [1, 0],
            "attention_bias": True,
            "attention_chunk_size": 6,
        },
    ),
    "jamba": causal("Jamba", JAMBA),
    "jamba-biases": causal(
        "Jamba",
        {**JAMBA, "mamba_proj_bias": True, "mamba_conv_bias": False},
        padding="alone",
        note="the input projection's bias enters the convolution at padding",
    ),
    "qwen3_vl_moe": Spec(*VISION, explicit_positions=False),
    "qwen3_vl_moe-transposed": Spec(*VISION, explicit_positions=False, rewrite=transpose_experts),
    "kimi_k2": causal("DeepseekV3", {**MLA, "n_group": 1, "topk_group": 1}, rewrite=call_it_kimi),
}

SWITCH_SPECS: dict[str, Spec] = {
    "switch": Spec("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", SWITCH),
    "switch-capacity": Spec(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**SWITCH, "expert_capacity": 3},
    ),
    "switch-all-sparse": Spec(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**SWITCH, "num_layers": 2, "num_decoder_layers": 3, "num_sparse_decoder_layers": 3},
    ),
}
