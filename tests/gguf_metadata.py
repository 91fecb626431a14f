"""The metadata that llama.cpp's converter writes, from transformers' configs: what GGUF tests make files with."""

from __future__ import annotations

from typing import Any


def common(c: Any, **more: Any) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for every model."""
    rope = c.rope_parameters
    found = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }
    if getattr(c, "head_dim", None):
        found |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if rope["rope_type"] == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for key in ("beta_fast", "beta_slow"):
            if key in rope:
                found[f"rope.scaling.yarn_{key}"] = float(rope[key])
    return found


def experts(c: Any, width: int) -> dict[str, Any]:
    count = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None) or c.n_routed_experts
    used = c.num_experts_per_tok
    return {"expert_count": count, "expert_used_count": used, "expert_feed_forward_length": width}


def latent(c: Any) -> dict[str, Any]:
    found = common(c, **experts(c, c.moe_intermediate_size))
    found |= {
        "feed_forward_length": c.intermediate_size,
        "attention.head_count_kv": 1,
        "leading_dense_block_count": c.first_k_dense_replace,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "expert_shared_count": c.n_shared_experts,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "rope.dimension_count": c.qk_rope_head_dim,
    }
    if c.q_lora_rank:
        found["attention.q_lora_rank"] = c.q_lora_rank
    if getattr(c, "n_group", None):
        found |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    if c.rope_parameters.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * c.rope_parameters["mscale_all_dim"]
    return found


def sigmoid(c: Any) -> dict[str, Any]:
    return {"expert_gating_func": 2, "expert_weights_norm": bool(c.norm_topk_prob)}


METADATA = {
    "llama": lambda c: common(c, feed_forward_length=c.intermediate_size),
    "mixtral": lambda c: common(c, feed_forward_length=c.intermediate_size, **experts(c, c.intermediate_size)),
    "qwen2_moe": lambda c: common(
        c, feed_forward_length=c.intermediate_size, **experts(c, c.moe_intermediate_size),
        expert_shared_feed_forward_length=c.shared_expert_intermediate_size,
    ),
    "qwen3_moe": lambda c: common(c, feed_forward_length=48, **experts(c, c.moe_intermediate_size)),
    "olmoe": lambda c: common(c, feed_forward_length=c.intermediate_size, **experts(c, c.intermediate_size)),
    "deepseek_v2": latent,
    "deepseek_v3": lambda c: latent(c) | sigmoid(c),
    "gpt_oss": lambda c: common(
        c, feed_forward_length=c.intermediate_size, **experts(c, c.intermediate_size),
        **{"attention.sliding_window": c.sliding_window, "expert_gating_func": 3},
    ),
    "dbrx": lambda c: {
        "block_count": c.n_layers,
        "context_length": c.max_seq_len,
        "embedding_length": c.d_model,
        "feed_forward_length": c.ffn_config.ffn_hidden_size,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.attn_config.kv_n_heads,
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "attention.clamp_kqv": float(c.attn_config.clip_qkv),
        "expert_count": c.ffn_config.moe_num_experts,
        "expert_used_count": c.ffn_config.moe_top_k,
        "attention.layer_norm_epsilon": 1e-5,
    },
    "glm4_moe": lambda c: common(
        c, feed_forward_length=c.intermediate_size, **experts(c, c.moe_intermediate_size), **sigmoid(c),
        expert_shared_count=c.n_shared_experts, leading_dense_block_count=c.first_k_dense_replace,
        expert_weights_scale=float(c.routed_scaling_factor), expert_group_count=c.n_group,
        expert_group_used_count=c.topk_group, **{"rope.dimension_count": c.head_dim // 2},
    ),
    "granitemoe": lambda c: common(
        c, feed_forward_length=c.intermediate_size, expert_count=c.num_local_experts,
        expert_used_count=c.num_experts_per_tok, embedding_scale=float(c.embedding_multiplier),
        residual_scale=float(c.residual_multiplier), logit_scale=float(c.logits_scaling),
        **{"attention.scale": float(c.attention_multiplier)},
    ),
    "minimax_m2": lambda c: common(
        c, feed_forward_length=c.intermediate_size, **experts(c, c.intermediate_size), expert_gating_func=2,
        **{"rope.dimension_count": c.head_dim // 2},
    ),
    "gpt2": lambda c: {
        "block_count": c.n_layer,
        "context_length": c.n_positions,
        "embedding_length": c.n_embd,
        "feed_forward_length": 4 * c.n_embd,
        "attention.head_count": c.n_head,
        "attention.layer_norm_epsilon": c.layer_norm_epsilon,
    },
}  # fmt: skip
