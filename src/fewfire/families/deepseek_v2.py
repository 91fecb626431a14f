"""DeepSeek-V2 and V2-Lite: MLA with interleaved rope, softmax router whose weights are scaled and never renormalised.

Source: transformers `DeepseekV2Config`; DeepSeek-V2 report, section 2.2. Its router ignores norm_topk_prob.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import GroupConfig, LatentAttentionConfig, ModelConfig, NormConfig, RouterConfig
from fewfire.families import decoder as common
from fewfire.families import latent
from fewfire.families.reader import Reader

tensors = latent.tensors
ignored_tensors = latent.ignored_tensors


def read(hub: Reader) -> ModelConfig:
    mla = latent.read_latent(hub, pairing="interleaved", q_rank=hub.integer("q_lora_rank", default=None, minimum=1))
    moe = latent.read_moe(hub, _read_router(hub))
    layers = latent.read_layers(hub, mla, moe, dense=0)
    hub.expect("mlp_bias", False)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return latent.with_mtp(hub, common.read_model(hub, "deepseek_v2", layers, norm), copies=True)


def _read_router(hub: Reader) -> RouterConfig:
    hub.expect("scoring_func", "softmax")
    hub.expect("norm_topk_prob", False, why="transformers' router ignores it and DeepSeek's own does not scale then")
    method = hub.string("topk_method", default="greedy")
    hub.expect("topk_method", "greedy", "group_limited_greedy")
    groups = None
    if method == "group_limited_greedy":
        groups = GroupConfig(hub.integer("n_group", minimum=1), hub.integer("topk_group", minimum=1), "max")
    hub.skip("n_group", "topk_group")
    return RouterConfig(
        num_experts=hub.integer(*common.EXPERTS),
        top_k=hub.integer(*common.TOP_K),
        score="softmax",
        renormalize=False,
        scale=hub.number("routed_scaling_factor", default=1.0),
        select_bias=False,
        groups=groups,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    moe = common.first_moe(config)
    return {
        **common.write_model(config, "DeepseekV2ForCausalLM"),
        **latent.write_latent(common.first_mixer(config, LatentAttentionConfig)),
        **latent.write_moe(config, moe),
        **latent.write_layers(config),
        **latent.write_mtp(config),
        "topk_method": "greedy" if moe.router.groups is None else "group_limited_greedy",
        "rms_norm_eps": config.norm.eps,
    }
