"""Packs of tiny random models of every shape that the engine runs, made from our own configurations."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewfire.checkpoints.pack_writer import write_pack
from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    FeedForwardConfig,
    GroupConfig,
    IndexerConfig,
    LatentAttentionConfig,
    LayerConfig,
    LightningConfig,
    LstmConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RelativeBiasConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.formats import encode
from fewfire.model.build import build_model
from fewfire.plan.memory import choose_formats

VOCAB, DIM, CONTEXT = 83, 48, 256
RMS = NormConfig("rms", 1e-5)


def attention(**changes: Any) -> AttentionConfig:
    base = dict(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, rope=RopeConfig(1e4, 16))
    return AttentionConfig(**{**base, **changes})


def latent(**changes: Any) -> LatentAttentionConfig:
    base = dict(num_heads=3, q_rank=24, kv_rank=32, nope_dim=20, rope_dim=16, value_dim=12, scale=0.17)
    rope = RopeConfig(1e4, 16, "interleaved")
    return LatentAttentionConfig(**{**base, "rope": rope, **changes})


def router(**changes: Any) -> RouterConfig:
    base = dict(num_experts=6, top_k=2, score="softmax", renormalize=True, scale=1.0, select_bias=False)
    return RouterConfig(**{**base, **changes})


def swiglu(width: int = 40, **changes: Any) -> FeedForwardConfig:
    return FeedForwardConfig(**{**dict(hidden_dim=width, activation="silu", gated=True), **changes})


def moe(expert: FeedForwardConfig | None = None, shared: int = 0, gate: bool = False, **changes: Any) -> MoEConfig:
    return MoEConfig(router(**changes), expert or swiglu(), swiglu(shared) if shared else None, gate)


def model(*layers: tuple[Any, Any], **changes: Any) -> ModelConfig:
    blocks = tuple(LayerConfig(mixer, ffn) for mixer, ffn in layers)
    base = dict(family="fewfire", vocab_size=VOCAB, model_dim=DIM, layers=blocks, norm=RMS, tied_head=False)
    return ModelConfig(**{**base, "max_context": CONTEXT, **changes})


def indexer(top_k: int = 9, **changes: Any) -> IndexerConfig:
    return IndexerConfig(**{**dict(num_heads=2, head_dim=16, top_k=top_k, pairing="half"), **changes})


CLAMPED = FeedForwardConfig(24, "swiglu_clamped", True, bias=True, clamp=(1.7, 0.9))
V3 = dict(score="sigmoid", select_bias=True, scale=2.5, renormalize_eps=1e-20)
BIASED = dict(qkv_bias=True, out_bias=True)
SINKS = dict(sinks=True, **BIASED)
SELECTED = dict(score="softmax_selected", renormalize=False)
ON_INPUT = dict(score="sigmoid_selected", weight_on="input", top_k=1, renormalize=False)
TURNED = RopeConfig(1e4, 16, "interleaved")
L2 = dict(qk_norm="l2", chunk=16)
# What a real family has, in small; between them every branch of the engine.
MODELS: dict[str, ModelConfig] = {
    "llama": model((attention(num_kv_heads=1), swiglu()), (attention(), swiglu(33)), tied_head=True),
    "olmoe": model((attention(num_kv_heads=4, qk_norm="full", clip_qkv=0.6), moe(renormalize=False))),
    "qwen3_moe": model((attention(qk_norm="head", num_heads=16), moe()), (attention(qk_norm="head"), swiglu())),
    "mixtral": model((attention(window=7), moe(swiglu(20), **SELECTED))),
    "qwen2_moe": model((attention(qkv_bias=True), moe(shared=24, gate=True, renormalize=False))),
    "glm4_moe": model((attention(rope=RopeConfig(1e4, 8)), swiglu()), (attention(), moe(shared=24, **V3))),
    "deepseek_v2_lite": model((latent(q_rank=None), swiglu()), (latent(q_rank=None), moe(shared=24, scale=0.5))),
    "deepseek_v2": model((latent(), moe(shared=24, groups=GroupConfig(3, 2, "max"), renormalize=False, scale=16.0))),
    "deepseek_v3": model((latent(bias=True), moe(shared=24, groups=GroupConfig(3, 2, "top2_sum"), **V3))),
    "deepseek_v32": model((latent(indexer=indexer()), moe(**V3)), (latent(indexer=indexer()), swiglu())),
    "glm_moe_dsa": model(
        (latent(indexer=indexer(pairing="interleaved")), swiglu()), (latent(indexer=indexer(shared=True)), moe(**V3))
    ),
    "gpt_oss": model(
        (attention(window=7, **SINKS), moe(CLAMPED, bias=True, **SELECTED)),
        (attention(**SINKS), moe(CLAMPED, bias=True, **SELECTED)),
    ),
    "dbrx": model((attention(clip_qkv=0.5), moe(top_k=3)), norm=NormConfig("layer", 1e-5)),
    "gpt2": model(
        (attention(rope=None, num_kv_heads=4, **BIASED), swiglu(gated=False, activation="gelu_tanh", bias=True)),
        norm=NormConfig("layer", 1e-5, bias=True), learned_positions=CONTEXT, tied_head=True,
    ),
    "grok": model(
        (attention(logit_cap=2.0), moe(swiglu(activation="gelu"))),
        sandwich=True, embed_scale=3.0, logit_scale=0.5,
    ),
    "phimoe": model(
        (attention(**BIASED), moe(score="sparsemixer", jitter=0.01, renormalize=False)),
        norm=NormConfig("layer", 1e-5, bias=True), head_bias=True,
    ),
    "granite": model((attention(), moe(**SELECTED)), residual_scale=0.2, logit_scale=0.3),
    "llama4": model(
        (attention(rope=TURNED, **L2), moe(shared=24, **ON_INPUT)),
        (attention(rope=None, temperature=(0.1, 8.0)), swiglu()),
    ),
    "gated": model(
        (attention(output_gate=True, qk_norm="head", rope=RopeConfig(1e4, 8)), moe()),
        norm=NormConfig("rms", 1e-6, offset=True),
    ),
    "relu": model((attention(), moe(swiglu(activation="relu", gated=False, width=17)))),
}  # fmt: skip


BIAS = RelativeBiasConfig(8, 16, owner=True)
APART = dict(rope=None, num_kv_heads=4, scale=1.0)
SWITCHED = dict(renormalize=False, top_k=1, capacity=5)
# What torch runs around native experts.
HYBRIDS: dict[str, ModelConfig] = {
    "qwen3_next": model((DeltaNetConfig(2, 4, 8, 8, 4), moe()), (attention(), moe(shared=24, gate=True))),
    "jamba": model((MambaConfig(32, 6, 4, 3, True, True), moe()), (attention(rope=None), swiglu())),
    "minimax": model(
        (LightningConfig(3, 16), moe(**SELECTED)), (attention(), moe(**SELECTED)),
        normed_residual=(3.5, 3.5, 3.5, 1.0, 1.0, 1.0),
    ),
    "lstm": model(
        (LstmConfig(64), moe(score="noisy_softmax", renormalize=False)), (LstmConfig(DIM), None),
        norm=NormConfig("none", 1e-6),
    ),
    "switch": ModelConfig(
        "fewfire", VOCAB, DIM,
        (LayerConfig(attention(relative_bias=BIAS, **APART), moe(**SWITCHED), attention(causal=False, **APART)),),
        RMS, True, CONTEXT,
        encoder=(LayerConfig(attention(causal=False, relative_bias=BIAS, **APART), moe(**SWITCHED)),),
        decoder_start_token_id=0,
    ),
}  # fmt: skip


class ModuleSource:
    """A pack's source: the parameters and buffers of a module."""

    def __init__(self, module: Any):
        self.config, self.state = module.config, module.state_dict()

    def encoded(self, name: str, expert: int | None, format_name: str, shape: tuple[int, ...]) -> Any:
        values = self.state[name] if expert is None else self.state[name][expert]
        return encode(values.reshape(shape).float(), format_name)


def draw(config: ModelConfig) -> Any:
    """The torch module of `config` with every tensor drawn from its name: none hides at its default."""
    module = build_model(config)
    with torch.no_grad():
        for name, values in module.state_dict().items():
            noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            scale = 0.3 if values.dim() < 2 else 1.3 * values.shape[-1] ** -0.5
            values.copy_(1 + 0.2 * noise if name.endswith("norm.weight") and not config.norm.offset else scale * noise)
    return module.eval()


def make(folder: Path, name: str, quant: str = "f32", *, times: int = 1, **parts: str) -> Path:
    """A pack of MODELS[name] or HYBRIDS[name], once for each folder; of its layers `times` over."""
    path = folder / f"{name}-{quant}-{times}"
    if not path.exists():
        config = (MODELS | HYBRIDS)[name]
        module = draw(replace(config, layers=times * config.layers))
        write_pack(path, ModuleSource(module), choose_formats(module.config, quant, **parts))
    return path
