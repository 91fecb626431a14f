"""llama.cpp's architectures as hub configs, which `families` then reads as strictly as any other.

One function an architecture; what it leaves out is what the family's class has anyway. Sources: the GGUF
specification of the ggml project and the keys that its converter writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fewfire.checkpoints.gguf.metadata import Metadata
from fewfire.errors import ConfigError, FormatError

Hub = dict[str, Any]
_SIGMOID = 2  # of expert_gating_func


def hub_config(metadata: Metadata, ignore: frozenset[str] = frozenset()) -> Hub:
    """The hub config of a GGUF file. `ignore`: full metadata keys to leave aside.

    Raises: ConfigError for an architecture that is not known, FormatError for metadata that is missing or odd.
    """
    name = metadata.header.architecture
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{metadata.path}: architecture {name!r} is not known in GGUF files; expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}, or the model's hub checkpoint"
        )
    hub = ARCHITECTURES[name](metadata)
    metadata.close(ignore)
    return hub


def _common(m: Metadata, model_type: str) -> Hub:
    """What llama and its descendants share. The head's width is written only where it is not implied."""
    vocab, dim = m.shape("token_embd.weight")
    heads = m.integer("attention.head_count")
    if dim != m.integer("embedding_length"):
        raise m.wrong("embedding_length", f"is not the {dim} of token_embd.weight; download the file again")
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": dim,
        "num_hidden_layers": num_layers(m),
        "num_attention_heads": heads,
        "num_key_value_heads": m.integer("attention.head_count_kv", heads),
        "max_position_embeddings": m.integer("context_length"),
        "tie_word_embeddings": not m.has_tensor("output.weight"),
        "bos_token_id": m.token_id("bos"),
        "eos_token_id": m.token_id("eos"),
        "dtype": "float32",
    }


def num_layers(m: Metadata) -> int:
    """Blocks that plain decoding runs: those of multi-token prediction come last and are left out."""
    total = m.integer("block_count") - m.integer("nextn_predict_layers", 0)
    if not 1 <= total <= 10_000:
        raise m.wrong("block_count", f"leaves {total} layers; download the file again")
    return total


def _llama_like(m: Metadata, model_type: str) -> Hub:
    """`_common` with ordinary attention, its rope, and RMS norms."""
    hub = _common(m, model_type)
    if not hub["num_attention_heads"] or hub["hidden_size"] % hub["num_attention_heads"] and not m.given(_KEY):
        raise m.wrong("attention.head_count", f"({hub['num_attention_heads']}) does not divide the model's width")
    head_dim = m.integer(_KEY, hub["hidden_size"] // hub["num_attention_heads"])
    turned = m.integer("rope.dimension_count", head_dim)
    hub |= {"head_dim": head_dim, "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon")}
    hub |= {"rope_theta": m.number("rope.freq_base", 10_000.0), "rope_scaling": _rope_scaling(m, hub, turned)}
    if turned != head_dim:
        hub["partial_rotary_factor"] = turned / head_dim
    return hub


_KEY = "attention.key_length"


def _rope_scaling(m: Metadata, hub: Hub, turned: int) -> Hub | None:
    kind = m.string("rope.scaling.type", "none")
    if m.has_tensor("rope_freqs.weight"):
        return _frequency_factors(m, hub, turned)
    if kind == "none":
        m.given("rope.scaling.factor"), m.given("rope.scaling.original_context_length")
        return None
    factor = m.number("rope.scaling.factor")
    if kind == "linear":
        m.given("rope.scaling.original_context_length")
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise m.wrong("rope.scaling.type", f"is {kind!r}, expected none, linear or yarn")
    scaling: Hub = {"rope_type": "yarn", "factor": factor}
    scaling["original_max_position_embeddings"] = m.integer("rope.scaling.original_context_length")
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if m.given(f"rope.scaling.{key}"):
            scaling[name] = m.number(f"rope.scaling.{key}")
    for key in ("yarn_attn_factor", "attn_factor"):
        if m.given(f"rope.scaling.{key}"):
            scaling["attention_factor"] = m.number(f"rope.scaling.{key}")
    return scaling


def _frequency_factors(m: Metadata, hub: Hub, turned: int) -> Hub:
    """rope_freqs.weight divides each frequency: Llama 3.1's scaling where one of its releases fits, else as given."""
    factors = m.small_tensor("rope_freqs.weight")
    if len(factors) != turned // 2:
        raise FormatError(f"has {len(factors)} values, expected {turned // 2}", path=m.path, record="rope_freqs.weight")
    theta = m.number("rope.freq_base", 10_000.0)
    for factor in (8.0, 32.0, 16.0, 4.0, 2.0, 64.0):
        for low, high in ((1.0, 4.0), (1.0, 1.0)):
            expected = llama3_factors(theta, turned, factor, low, high, 8192)
            if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected)):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": 8192,
                }
    given = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1.0}
    return given | {"original_max_position_embeddings": hub["max_position_embeddings"], "attention_factor": 1.0}


def llama3_factors(theta: float, turned: int, factor: float, low: float, high: float, context: int) -> list[float]:
    """What divides each of the turned/2 frequencies of a llama3 rope. Source: Llama 3.1 reference."""
    factors = []
    for index in range(0, turned, 2):
        wavelength = 2 * math.pi * theta ** (index / turned)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low) if high != low else 0.0
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _experts(m: Metadata) -> Hub:
    return {"num_experts": m.integer("expert_count"), "num_experts_per_tok": m.integer("expert_used_count")}


def _expert_width(m: Metadata) -> int:
    """The experts' width, which older files have in their tensors alone."""
    m.given("expert_feed_forward_length"), m.given("feed_forward_length")
    for layer in range(num_layers(m)):
        if m.has_tensor(f"blk.{layer}.ffn_up_exps.weight"):
            return m.shape(f"blk.{layer}.ffn_up_exps.weight")[-2]
    raise FormatError("has no experts in any block; download it again", path=m.path)


def _dense_layers(m: Metadata) -> list[int]:
    return [layer for layer in range(num_layers(m)) if not m.has_tensor(f"blk.{layer}.ffn_gate_inp.weight")]


# ---------------------------------------------------------------------------------------------------- architectures


def _llama(m: Metadata) -> Hub:
    if m.integer("expert_count", 0):
        hub = _llama_like(m, "mixtral") | {"intermediate_size": _expert_width(m)}
        experts = _experts(m)
        return hub | {"num_local_experts": experts.pop("num_experts"), **experts}
    m.given("expert_used_count")
    return _llama_like(m, "llama") | {
        "intermediate_size": m.integer("feed_forward_length"),
        "attention_bias": m.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": m.has_tensor("blk.0.ffn_up.bias"),
    }


def _qwen2moe(m: Metadata) -> Hub:
    m.given("expert_shared_feed_forward_length")
    return _llama_like(m, "qwen2_moe") | {
        **_experts(m),
        "qkv_bias": m.has_tensor("blk.0.attn_q.bias"),
        "moe_intermediate_size": _expert_width(m),
        "shared_expert_intermediate_size": m.shape("blk.0.ffn_up_shexp.weight")[0],
        "intermediate_size": m.integer("feed_forward_length", 1),
        "mlp_only_layers": _dense_layers(m),
        "norm_topk_prob": m.boolean("expert_weights_norm", False),
    }


def _qwen3moe(m: Metadata) -> Hub:
    return _llama_like(m, "qwen3_moe") | {
        **_experts(m),
        "attention_bias": m.has_tensor("blk.0.attn_q.bias"),
        "moe_intermediate_size": _expert_width(m),
        "intermediate_size": m.integer("feed_forward_length", 1) or 1,
        "mlp_only_layers": _dense_layers(m),
        "norm_topk_prob": m.boolean("expert_weights_norm", True),
    }


def _olmoe(m: Metadata) -> Hub:
    return _llama_like(m, "olmoe") | {
        **_experts(m),
        "attention_bias": m.has_tensor("blk.0.attn_q.bias"),
        "intermediate_size": _expert_width(m),
        "clip_qkv": m.number("attention.clamp_kqv") if m.given("attention.clamp_kqv") else None,
        "norm_topk_prob": m.boolean("expert_weights_norm", False),
    }


def _deepseek2(m: Metadata) -> Hub:
    """DeepSeek-V2, V3 and Kimi-K2. Files from before the group keys existed get their release's groups."""
    third = m.integer("expert_gating_func", 1) == _SIGMOID
    hub = _common(m, "deepseek_v3" if third else "deepseek_v2")
    experts, rope_dim = m.integer("expert_count"), m.integer("rope.dimension_count")
    key = m.integer("attention.key_length_mla", m.integer(_KEY, 192))
    old_groups = {160: (8, 3), 256: (8, 4)}.get(experts, (1, 1))
    hub |= {
        "rms_norm_eps": m.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": m.number("rope.freq_base", 10_000.0),
        "rope_scaling": _deepseek_rope(m, hub, rope_dim),
        "q_lora_rank": m.integer("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": m.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key - rope_dim,
        "v_head_dim": m.integer("attention.value_length_mla", m.integer("attention.value_length", 128)),
        "n_routed_experts": experts,
        "n_shared_experts": m.integer("expert_shared_count", 0),
        "num_experts_per_tok": m.integer("expert_used_count"),
        "moe_intermediate_size": _expert_width(m),
        "intermediate_size": m.integer("feed_forward_length"),
        "first_k_dense_replace": m.integer("leading_dense_block_count", 0),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0) or 1.0,
        "n_group": m.integer("expert_group_count", old_groups[0]),
        "topk_group": m.integer("expert_group_used_count", old_groups[1]),
        "norm_topk_prob": m.boolean("expert_weights_norm", third),
    }
    if not third:
        hub["topk_method"] = "group_limited_greedy" if hub["n_group"] > 1 else "greedy"
    hub["num_key_value_heads"] = hub["num_attention_heads"]  # 1 in files for absorbed attention
    return hub


def _deepseek_rope(m: Metadata, hub: Hub, rope_dim: int) -> Hub | None:
    """YaRN with its temperature: the file stores a tenth of mscale_all_dim, which releases have equal to mscale."""
    multiplier = m.number("rope.scaling.yarn_log_multiplier", 0.1)
    scaling = _rope_scaling(m, hub, rope_dim)
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), float(f"{10 * multiplier:.6g}"))
    return scaling


def _gpt_oss(m: Metadata) -> Hub:
    hub = _llama_like(m, "gpt_oss") | _experts(m)
    if hub["rope_scaling"] is not None:
        hub["rope_scaling"]["truncate"] = False
    m.given("expert_gating_func")
    return hub | {
        "intermediate_size": _expert_width(m),
        "sliding_window": m.integer("attention.sliding_window"),
        "attention_bias": m.has_tensor("blk.0.attn_q.bias"),
    }


def _dbrx(m: Metadata) -> Hub:
    hub, experts = _common(m, "dbrx"), _experts(m)
    m.given("attention.layer_norm_epsilon"), m.given("rope.dimension_count")
    return {
        "model_type": "dbrx",
        "d_model": hub["hidden_size"],
        "n_layers": hub["num_hidden_layers"],
        "n_heads": hub["num_attention_heads"],
        "max_seq_len": hub["max_position_embeddings"],
        "attn_config": {
            "kv_n_heads": hub["num_key_value_heads"],
            "clip_qkv": m.number("attention.clamp_kqv") if m.given("attention.clamp_kqv") else None,
            "rope_theta": m.number("rope.freq_base", 10_000.0),
        },
        "ffn_config": {
            "ffn_hidden_size": _expert_width(m),
            "moe_num_experts": experts["num_experts"],
            "moe_top_k": experts["num_experts_per_tok"],
            "moe_normalize_expert_weights": 1.0,
        },
        **{key: hub[key] for key in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype")},
    }


def _grok(m: Metadata) -> Hub:
    """Grok-1. Files from before these keys existed have the release's values."""
    m.given("router_logit_softcapping")  # the released code has none
    hub = _llama_like(m, "grok-1") | _experts(m)
    return hub | {
        "intermediate_size": _expert_width(m),
        "max_attn_value": m.number("attn_logit_softcapping", 30.0),
        "attn_output_multiplier": m.number("attention.output_scale", 0.08838834764831845),
        "embedding_multiplier_scale": m.number("embedding_scale", 78.38367176906169),
        "output_multiplier_scale": m.number("logit_scale", 0.5773502691896257),
    }


def _glm4moe(m: Metadata) -> Hub:
    hub = _llama_like(m, "glm4_moe")
    m.given("expert_gating_func")
    return hub | {
        "attention_bias": m.has_tensor("blk.0.attn_q.bias"),
        "use_qk_norm": m.has_tensor("blk.0.attn_q_norm.weight"),
        "n_routed_experts": m.integer("expert_count"),
        "n_shared_experts": m.integer("expert_shared_count", 1),
        "num_experts_per_tok": m.integer("expert_used_count"),
        "moe_intermediate_size": _expert_width(m),
        "intermediate_size": m.integer("feed_forward_length"),
        "first_k_dense_replace": m.integer("leading_dense_block_count", 1),
        "routed_scaling_factor": m.number("expert_weights_scale", 1.0),
        "n_group": m.integer("expert_group_count", 1),
        "topk_group": m.integer("expert_group_used_count", 1),
        "norm_topk_prob": m.boolean("expert_weights_norm", True),
    }


def _granitemoe(m: Metadata) -> Hub:
    hub, experts = _llama_like(m, "granitemoe"), _experts(m)
    return hub | {
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "intermediate_size": _expert_width(m),
        "attention_bias": m.has_tensor("blk.0.attn_q.bias"),
        "attention_multiplier": m.number("attention.scale", 1.0),
        "embedding_multiplier": m.number("embedding_scale", 1.0),
        "residual_multiplier": m.number("residual_scale", 1.0),
        "logits_scaling": m.number("logit_scale", 1.0),
    }


def _minimax_m2(m: Metadata) -> Hub:
    hub = _llama_like(m, "minimax_m2") | _experts(m)
    m.given("expert_gating_func")
    hub.pop("partial_rotary_factor", None)
    return hub | {
        "intermediate_size": _expert_width(m),
        "rotary_dim": m.integer("rope.dimension_count", hub["head_dim"]),
    }


def _gpt2(m: Metadata) -> Hub:
    hub = _common(m, "gpt2")
    return {
        "model_type": "gpt2",
        "n_embd": hub["hidden_size"],
        "n_layer": hub["num_hidden_layers"],
        "n_head": hub["num_attention_heads"],
        "n_positions": m.shape("position_embd.weight")[0],
        "n_inner": m.integer("feed_forward_length"),
        "layer_norm_epsilon": m.number("attention.layer_norm_epsilon"),
        **{key: hub[key] for key in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "dtype")},
    }


ARCHITECTURES: dict[str, Callable[[Metadata], Hub]] = {
    "dbrx": _dbrx,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "granitemoe": _granitemoe,
    "grok": _grok,
    "llama": _llama,
    "minimax-m2": _minimax_m2,
    "olmoe": _olmoe,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
}
