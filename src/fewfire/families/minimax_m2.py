"""MiniMax-M2: q/k norms over the whole projection, half of each head turned, sigmoid router with a selection bias.

Source: transformers `MiniMaxM2Config`. Hub files say `rotary_dim`; the bias lies at the block, not at the gate.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families.reader import Reader
from fewfire.families.rope import read_rope, write_rope
from fewfire.families.tensors import LLAMA_ATTENTION, MIXTRAL_MOE, HubTensor, decoder


def read(hub: Reader) -> ModelConfig:
    head_dim = common.head_dim(hub)
    turned = hub.integer("rotary_dim", default=head_dim, minimum=2)
    rope = read_rope(hub, head_dim=head_dim, max_context=common.context(hub), theta=5e6, partial=turned / head_dim)
    attention = common.read_attention(hub, rope, qk_norm="full")
    hub.expect("use_qk_norm", True)
    hub.expect("qk_norm_type", "per_layer")
    hub.expect("use_routing_bias", True)
    hub.expect("scoring_func", "sigmoid")
    hub.expect("shared_intermediate_size", 0)
    hub.expect("attn_type_list", [1] * common.num_layers(hub))
    for name in ("full_attention", "linear_attention", "mlp"):
        hub.expect(f"layernorm_{name}_alpha", 1.0)
        hub.expect(f"layernorm_{name}_beta", 1.0)
    # Multi-token prediction is announced, but released checkpoints hold none of it.
    hub.skip("use_mtp", "num_mtp_modules", "mtp_transformer_layers")
    router = RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="sigmoid",
        renormalize=True,
        scale=1.0,
        select_bias=True,
        jitter=hub.number("router_jitter_noise", default=0.0),  # training only
    )
    moe = MoEConfig(router, common.gated(hub.integer("intermediate_size", minimum=1), common.read_activation(hub)))
    layers = (LayerConfig(attention, moe),) * common.num_layers(hub)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return common.read_model(hub, "minimax_m2", layers, norm)


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = common.first_mixer(config, AttentionConfig), common.first_moe(config)
    rope = common.hub_rope(attention, config.family)
    keys = write_rope(rope, head_dim=attention.head_dim)
    keys.pop("partial_rotary_factor", None)
    return {
        **common.write_model(config, "MiniMaxM2ForCausalLM"),
        **common.write_attention(attention),
        **keys,
        "rotary_dim": rope.dim,
        "num_local_experts": moe.router.num_experts,
        "num_experts_per_tok": moe.router.top_k,
        "router_jitter_noise": moe.router.jitter,
        "intermediate_size": moe.expert.hidden_dim,
        "hidden_act": common.write_activation(moe.expert),
        "rms_norm_eps": config.norm.eps,
    }


def tensors(config: ModelConfig) -> list[HubTensor]:
    return decoder(config, LLAMA_ATTENTION, MIXTRAL_MOE)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    return common.tied_head(config)
