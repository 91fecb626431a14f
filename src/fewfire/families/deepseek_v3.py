"""DeepSeek-V3 and R1: MLA, sigmoid router with a selection bias and group-limited choice, one shared expert.

Source: transformers `DeepseekV3Config`; DeepSeek-V3 report, section 2.1. Kimi-K2 is the same architecture.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import LatentAttentionConfig, ModelConfig, NormConfig
from fewfire.families import decoder as common
from fewfire.families import latent
from fewfire.families.reader import Reader

tensors = latent.tensors
ignored_tensors = latent.ignored_tensors


def read(hub: Reader, family: str = "deepseek_v3") -> ModelConfig:
    interleaved = hub.boolean("rope_interleave", default=True)
    q_rank = hub.integer("q_lora_rank", default=None, minimum=1)
    mla = latent.read_latent(hub, pairing="interleaved" if interleaved else "half", q_rank=q_rank)
    moe = latent.read_moe(hub, latent.read_sigmoid_router(hub, groups=8, top_groups=4, scale=2.5))
    layers = latent.read_layers(hub, mla, moe, dense=3)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return latent.with_mtp(hub, common.read_model(hub, family, layers, norm), copies=True)


def write(config: ModelConfig) -> dict[str, Any]:
    mla = common.first_mixer(config, LatentAttentionConfig)
    moe = common.first_moe(config)
    return {
        **common.write_model(config, "DeepseekV3ForCausalLM"),
        **latent.write_latent(mla),
        **latent.write_moe(config, moe),
        **latent.write_layers(config),
        **latent.write_mtp(config),
        "rope_interleave": mla.rope.pairing == "interleaved",
        "rms_norm_eps": config.norm.eps,
    }
