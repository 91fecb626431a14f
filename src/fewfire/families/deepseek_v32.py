"""DeepSeek-V3.2: V3 with sparse attention: an indexer picks the cached tokens that a query may see.

The indexer's rope is half-split, the main one interleaved. Source: transformers `DeepseekV32Config`, its indexer.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import IndexerConfig, LatentAttentionConfig, ModelConfig, NormConfig
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families import latent
from fewfire.families.reader import Reader
from fewfire.families.rope import Pairing

tensors = latent.tensors
ignored_tensors = latent.ignored_tensors


def read(hub: Reader) -> ModelConfig:
    hub.expect("rope_interleave", True)
    hub.expect("mlp_bias", False)
    hub.expect("layer_types", ["indexed_attention"] * common.num_layers(hub))
    mla = latent.read_latent(
        hub, pairing="interleaved", q_rank=hub.integer("q_lora_rank", minimum=1), indexer=read_indexer(hub, "half", 64)
    )
    moe = latent.read_moe(hub, latent.read_sigmoid_router(hub, groups=8, top_groups=4, scale=2.5))
    layers = latent.read_layers(hub, mla, moe, dense=3, listed=True)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-6))
    return latent.with_mtp(hub, common.read_model(hub, "deepseek_v32", layers, norm), copies=True)


def read_indexer(hub: Reader, pairing: Pairing, heads: int) -> IndexerConfig:
    """The indexer; `heads` is the class's default."""
    return IndexerConfig(
        num_heads=hub.integer("index_n_heads", default=heads, minimum=1),
        head_dim=hub.integer("index_head_dim", default=128, minimum=1),
        top_k=hub.integer("index_topk", default=2048, minimum=1),
        pairing=pairing,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    mla = common.first_mixer(config, LatentAttentionConfig)
    return {
        **common.write_model(config, "DeepseekV32ForCausalLM"),
        **latent.write_latent(mla),
        **write_indexer(mla, config.family),
        **latent.write_moe(config, common.first_moe(config)),
        **latent.write_layers(config, listed=True),
        **latent.write_mtp(config),
        "rms_norm_eps": config.norm.eps,
    }


def write_indexer(mla: LatentAttentionConfig, family: str) -> dict[str, Any]:
    indexer = mla.indexer
    if indexer is None:
        raise ConfigError(f"family {family} cannot express attention without an indexer; choose deepseek_v3")
    return {
        "index_n_heads": indexer.num_heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.top_k,
    }
