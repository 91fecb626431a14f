"""Each spec with one key of its config changed: what a reader of configs or a layer may have taken for granted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oracle.reference import Spec
from oracle.specs import SPECS, SWITCH_SPECS, YARN

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": YARN,
    "yarn with factors": {**YARN, "attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
ROTATED = (
    *("llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "minimax_m2", "qwen3_next"),
    *("gpt_oss", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "llama4_text", "minimax"),
)
COMMON: tuple[dict[str, Any], ...] = (
    {"tie_word_embeddings": True},
    {"num_attention_heads": 8, "num_key_value_heads": 8},
    {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5},
    {"rms_norm_eps": 1e-2},
)
MOE_COMMON: tuple[dict[str, Any], ...] = ({"num_experts_per_tok": 1}, {"hidden_act": "gelu"})
FFN = {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 3, "hidden_size": 32}
OWN: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({"head_dim": 12}, {"mlp_bias": True}, {"attention_bias": True}, {"num_key_value_heads": 1}),
    "gpt2": (
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"n_inner": 50},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": False},
    ),
    "mixtral": ({"num_local_experts": 3}, {"head_dim": None}, {"num_key_value_heads": 1}),
    "qwen2_moe": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 3},
    ),
    "qwen3_moe": ({"use_sliding_window": True, "sliding_window": 4}, {"sliding_window": 4}, {"mlp_only_layers": []}),
    "qwen3_next": (
        {"attention_bias": True},
        {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
        {"linear_num_key_heads": 4},
        {"linear_key_head_dim": 6, "linear_value_head_dim": 10},
        {"linear_conv_kernel_dim": 2},
        {"mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
        {"norm_topk_prob": False},
    ),
    "olmoe": ({"attention_bias": True}, {"clip_qkv": None}),
    "deepseek_v2": (
        {"n_shared_experts": 1, "first_k_dense_replace": 0},
        {"topk_method": "greedy"},
        {"rope_parameters": PLAIN},
    ),
    "deepseek_v3": (
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2},
        {"n_group": 2, "topk_group": 1},
        {"n_shared_experts": 1},
        {"routed_scaling_factor": 1.0},
    ),
    "deepseek_v32": (
        {"index_topk": 3},
        {"index_topk": 100},
        {"attention_bias": True},
        {"mlp_layer_types": ["sparse", "dense"]},
        {"index_head_dim": 8},
    ),
    "glm_moe_dsa": (
        {"indexer_types": ["full"] * 4},
        {"indexer_types": ["full", "shared", "shared", "full"]},
    ),
    "glm4_moe": (
        {"use_qk_norm": False},
        {"attention_bias": False},
        {"n_group": 1, "topk_group": 1},
        {"first_k_dense_replace": 0},
        {"rope_parameters": PLAIN},
    ),
    "gpt_oss": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"swiglu_limit": 7.0, "swiglu_alpha": 1.5},
        {"attention_bias": False},
        {"num_hidden_layers": 3},
    ),
    "phimoe": (
        {"attention_bias": False},
        {"lm_head_bias": False},
        {"router_jitter_noise": 0.0},
        {"num_local_experts": 2},
    ),
    "granitemoe": ({"attention_bias": True}, {"tie_word_embeddings": False}),
    "minimax": ({"layer_types": None}, {"layer_types": ["full_attention"] * 3}),
    "minimax_m2": ({"rope_parameters": PLAIN},),
    "llama4_text": (
        {"moe_layers": [0, 3]},
        {"no_rope_layers": [1, 1, 0, 0]},
        {"attention_chunk_size": 100},
        {"use_qk_norm": False},
        {"attn_temperature_tuning": False},
        {"floor_scale": 8192},
        {"interleave_moe_layer_step": 1},
        {"layer_types": ["full_attention"] * 4},
    ),
    "jamba": (
        {"mamba_conv_bias": False},
        {"mamba_d_conv": 3},
        {"attn_layer_offset": 0},
        {"mamba_dt_rank": "auto"},
        {"num_experts": 1, "num_experts_per_tok": 1},
    ),
    "dbrx": (
        {"attn_config": {"clip_qkv": 0.7, "kv_n_heads": 1, "rope_theta": 5e5}},
        {"ffn_config": {**FFN, "moe_normalize_expert_weights": None}},
    ),
    "switch": (
        {"num_sparse_encoder_layers": 0},
        {"num_sparse_encoder_layers": 4},
        {"router_bias": True},
        {"num_decoder_layers": 2, "num_sparse_decoder_layers": 1},
        {"d_kv": 5},
        {"expert_capacity": 1},
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        {"layer_norm_epsilon": 1e-3},
        {"num_experts": 1},
    ),
}
WITHOUT_EXPERTS = ("llama", "gpt2")
ONE_ACTIVATION = ("gpt_oss",)
TWO_EXPERTS = ("phimoe",)


def all_variants() -> dict[str, Spec]:
    """'spec: change' -> Spec."""
    made: dict[str, Spec] = {}

    def add(name: str, changes: dict[str, Any], title: str = "") -> None:
        spec = SPECS.get(name) or SWITCH_SPECS[name]
        label = title or ", ".join(f"{key}={value}" for key, value in changes.items())
        made[f"{name}: {label}"] = replace(spec, values={**spec.values, **changes})

    for name in ROTATED:
        before = SPECS[name].values.get("rope_parameters", {})
        partial = {key: before[key] for key in ("partial_rotary_factor",) if key in before}
        for title, rope in ROPES.items():
            add(name, {"rope_parameters": {**rope, **partial}}, title)
    for name in (*ROTATED, "phimoe", "jamba", "deepseek_v2-lite"):
        for changes in COMMON:
            add(name, changes)
        for changes in MOE_COMMON if name not in WITHOUT_EXPERTS else ():
            fixed = (name in ONE_ACTIVATION and "hidden_act" in changes) or (
                name in TWO_EXPERTS and "num_experts_per_tok" in changes
            )
            if not fixed:
                add(name, changes)
    for name, own in OWN.items():
        for changes in own:
            add(name, changes)
    return made
