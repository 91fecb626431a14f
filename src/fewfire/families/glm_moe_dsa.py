"""GLM-5: DeepSeek-V3.2 with an interleaved indexer rope; layers may share the choice of the indexer before them.

Source: transformers `GlmMoeDsaConfig`. Layer 0 always has an indexer of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewfire.config import LatentAttentionConfig, ModelConfig, NormConfig
from fewfire.errors import ConfigError
from fewfire.families import decoder as common
from fewfire.families import deepseek_v32, latent
from fewfire.families.reader import Reader

tensors = latent.tensors
ignored_tensors = latent.ignored_tensors


def read(hub: Reader) -> ModelConfig:
    hub.expect("rope_interleave", True)
    hub.expect("indexer_rope_interleave", True)
    hub.expect("mlp_bias", False)
    hub.expect("layer_types", ["indexed_attention"] * common.num_layers(hub))
    hub.skip("index_share_for_mtp_iteration")
    indexer = deepseek_v32.read_indexer(hub, "interleaved", 32)
    mla = latent.read_latent(hub, pairing="interleaved", q_rank=hub.integer("q_lora_rank", minimum=1), indexer=indexer)
    shared = replace(mla, indexer=replace(indexer, shared=True))
    mixers = tuple(shared if kind == "shared" else mla for kind in _indexer_types(hub))
    moe = latent.read_moe(hub, latent.read_sigmoid_router(hub, groups=1, top_groups=1, scale=2.5))
    layers = latent.read_layers(hub, mixers, moe, dense=3, listed=True)
    norm = NormConfig("rms", hub.number("rms_norm_eps", default=1e-5))
    return latent.with_mtp(hub, common.read_model(hub, "glm_moe_dsa", layers, norm), copies=False)


def _indexer_types(hub: Reader) -> tuple[str, ...]:
    """full or shared a layer: listed, or by a pattern of F and S, or by a frequency after the first layers."""
    total = common.num_layers(hub)
    pattern = hub.get("index_topk_pattern", default=None)
    every = max(hub.integer("index_topk_freq", default=1), 1)
    offset = hub.integer("index_skip_topk_offset", default=2)
    if isinstance(pattern, str):
        pattern = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    listed = hub.items("indexer_types", kind=str, length=total, default=None)
    if listed is None and pattern is not None:
        listed = tuple(pattern)
    if listed is None:
        listed = tuple("shared" if max(i - offset + 1, 0) % every else "full" for i in range(total))
    if len(listed) != total or set(listed) - {"full", "shared"} or listed[0] != "full":
        raise ConfigError(f"indexer_types must name full or shared for each of {total} layers, and full for the first")
    return listed


def write(config: ModelConfig) -> dict[str, Any]:
    mla = common.first_mixer(config, LatentAttentionConfig)
    indexers = [layer.mixer.indexer for layer in config.layers if isinstance(layer.mixer, LatentAttentionConfig)]
    return {
        **common.write_model(config, "GlmMoeDsaForCausalLM"),
        **latent.write_latent(mla),
        **deepseek_v32.write_indexer(mla, config.family),
        "indexer_types": ["shared" if each is not None and each.shared else "full" for each in indexers],
        **latent.write_moe(config, common.first_moe(config)),
        **latent.write_layers(config, listed=True),
        **latent.write_mtp(config),
        "rms_norm_eps": config.norm.eps,
    }
