"""What a pack's model becomes for the native engine: matrices by address, numbers beside them; or why it cannot.

Owns the choice of what runs natively. Knows the engine's specification (native/include/model.hpp), not its steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewfire.checkpoints.pack import Pack
from fewfire.checkpoints.pack_layout import ExpertLayer
from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    IndexerConfig,
    LatentAttentionConfig,
    LayerConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.kernels.linear import NATIVE_FORMATS
from fewfire.model.rope import cos_sin
from fewfire.runtime.weights import EMBEDDING, Trunk, untouched_floats

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "gelu": 3, "swiglu_clamped": 4}
_SCORES = {"softmax": 0, "softmax_selected": 1, "sigmoid": 2, "sigmoid_selected": 3, "sparsemixer": 4}
_HEAD_NORMS = {None: 0, "head": 1, "full": 2, "l2": 3}
CACHE_FORMATS = {"bf16": 0, "q8": 1}
_ROPE_STEP = 1024  # positions whose angles are computed at a time
_LANES = 16  # widths of cached keys and values are multiples of this


def why_not_native(pack: Pack) -> str | None:
    """Why a pack's model needs torch, in a few words; None where every step of it is native."""
    config = pack.config
    if why := why_not_native_experts(pack):
        return why
    if foreign := sorted({each.format for each in pack.layout.trunk} - NATIVE_FORMATS.keys()):
        return f"weights in {', '.join(foreign)} have no kernel"
    if len({layer.ffn.router.top_k for layer in config.layers if isinstance(layer.ffn, MoEConfig)}) > 1:
        return "layers with different numbers of chosen experts have no native step"
    if config.encoder:
        return "an encoder has no native step"
    if config.norm.kind == "none" or config.normed_residual is not None:
        return "residuals of normed states, and models without norms, have no native step"
    return next((why for layer in config.layers if (why := _why_not_layer(layer)) is not None), None)


def why_not_native_experts(pack: Pack) -> str | None:
    """The same of its routed experts alone, which run natively also where torch runs the rest."""
    placed = [each for layer in pack.layout.experts for each in layer.matrices]
    if foreign := sorted({each.format for each in placed} - NATIVE_FORMATS.keys()):
        return f"experts in {', '.join(foreign)} have no kernel"
    return None


def _why_not_layer(layer: LayerConfig) -> str | None:
    mixer, ffn = layer.mixer, layer.ffn
    if not isinstance(mixer, AttentionConfig | LatentAttentionConfig) or layer.cross is not None or ffn is None:
        return f"{type(mixer).__name__.removesuffix('Config')} has no native step"
    scaling = None if mixer.rope is None else mixer.rope.scaling
    if scaling is not None and scaling.kind in ("dynamic", "longrope"):
        return f"{scaling.kind} positions depend on the length of the text"
    if isinstance(mixer, LatentAttentionConfig):
        if mixer.kv_rank % _LANES or mixer.rope_dim % _LANES:
            return f"latents of {mixer.kv_rank} + {mixer.rope_dim} have no native step (multiples of {_LANES} have)"
    else:
        if mixer.relative_bias is not None or not mixer.causal:
            return "attention with biases by distance, or to what comes later, has no native step"
        if mixer.head_dim % _LANES:
            return f"heads of {mixer.head_dim} have no native step (multiples of {_LANES} have)"
    if isinstance(ffn, MoEConfig):
        router = ffn.router
        if router.score not in _SCORES or router.branches or router.capacity is not None:
            return f"the router rule {router.score} with branches or a capacity has no native step"
    return None


class Lowered:
    """The specification of a pack's model, with addresses into `trunk` and into tensors made here: keep it alive."""

    def __init__(self, pack: Pack, trunk: Trunk, cache: str = "bf16"):
        self.config, self.trunk = pack.config, trunk
        self.tensors: list[Tensor] = []
        self._layouts = {layer.prefix: layer for layer in pack.layout.experts}
        self._ropes: dict[RopeConfig, tuple[Tensor, Tensor]] = {}
        self._roped = 0
        self.spec = self._model(cache)

    def prepare(self, positions: int) -> None:
        """Angles for the first `positions` positions: to be called before a step that reaches them."""
        if positions <= self._roped:
            return
        first, last = self._roped, -(-positions // _ROPE_STEP) * _ROPE_STEP
        for rope, (cos, sin) in self._ropes.items():
            stop = min(last, cos.shape[0])
            made = cos_sin(rope, torch.arange(first, stop)[None], stop)
            cos[first:stop], sin[first:stop] = made[0][0], made[1][0]
        self._roped = last

    def leave_embedding_on_disk(self) -> int:
        """A token needs one row: engines made from now on read that. Returns how many bytes of memory it frees."""
        if self.config.tied_head:  # all of it is the head
            return 0
        freed = self.trunk.leave_on_disk(EMBEDDING)
        if self.trunk.on_disk is not None:
            self.spec["embed_file"] = self.trunk.on_disk.spec
        return freed

    def _model(self, cache: str) -> dict[str, Any]:
        config = self.config
        embed = self.trunk.matrix(EMBEDDING)
        return {
            "model_dim": config.model_dim,
            "vocab_size": config.vocab_size,
            "embed_scale": config.embed_scale,
            "logit_scale": config.logit_scale,
            "residual_scale": config.residual_scale,
            "embed": embed,
            "embed_file": None,
            "positions": self.trunk.matrix("positions.weight") if config.learned_positions is not None else None,
            "head": embed if config.tied_head else self.trunk.matrix("head.weight"),
            "head_bias": self._vector("head.bias"),
            "norm": self._norm("norm"),
            "cache": CACHE_FORMATS[cache],
            "layers": [self._layer(f"layers.{index}.", layer) for index, layer in enumerate(config.layers)],
        }

    def _layer(self, prefix: str, layer: LayerConfig) -> dict[str, Any]:
        mixer, ffn, post = layer.mixer, layer.ffn, self.config.sandwich
        latent = isinstance(mixer, LatentAttentionConfig)
        return {
            "attention_norm": self._norm(f"{prefix}attention_norm"),
            "ffn_norm": self._norm(f"{prefix}ffn_norm"),
            "attention_post_norm": self._norm(f"{prefix}attention_post_norm") if post else None,
            "ffn_post_norm": self._norm(f"{prefix}ffn_post_norm") if post else None,
            "attention": None if latent else self._attention(f"{prefix}attention.", mixer),
            "latent": self._latent(f"{prefix}attention.", mixer) if latent else None,
            "moe": self._moe(f"{prefix}ffn.", ffn) if isinstance(ffn, MoEConfig) else None,
            "dense": self._feed_forward(f"{prefix}ffn.", ffn) if isinstance(ffn, FeedForwardConfig) else None,
        }

    # ------------------------------------------------------------------------------------------------- attention

    def _attention(self, prefix: str, config: Any) -> dict[str, Any]:
        assert isinstance(config, AttentionConfig)
        names = {"query": "q", "key": "k", "value": "v", "out": "out"}
        spec: dict[str, Any] = {name: self.trunk.matrix(f"{prefix}{ours}.weight") for name, ours in names.items()}
        spec |= {f"{name}_bias": self._vector(f"{prefix}{ours}.bias") for name, ours in names.items()}
        l2 = {"weight": 0, "bias": 0, "is_layer": False, "eps": self.config.norm.eps}
        normed = config.qk_norm in ("head", "full")
        temperature, floor = config.temperature or (0.0, 1.0)
        return spec | {
            "head_norm": _HEAD_NORMS[config.qk_norm],
            "query_norm": self._norm(f"{prefix}q_norm") if normed else l2,
            "key_norm": self._norm(f"{prefix}k_norm") if normed else l2,
            "sinks": self._vector(f"{prefix}sinks"),
            "rope": self._rope(config.rope),
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "window": config.window or 0,
            "chunk": config.chunk or 0,
            "has_output_gate": config.output_gate,
            "scale": config.scale,
            "clip": config.clip_qkv or 0.0,
            "cap": config.logit_cap or 0.0,
            "temperature": temperature,
            "temperature_floor": floor,
        }

    def _latent(self, prefix: str, config: Any) -> dict[str, Any]:
        assert isinstance(config, LatentAttentionConfig)
        norm, whole = NormConfig("rms", config.latent_eps), config.q_rank is None
        return {
            "query": self.trunk.matrix(f"{prefix}q.weight") if whole else None,
            "query_down": None if whole else self.trunk.matrix(f"{prefix}q_down.weight"),
            "query_up": None if whole else self.trunk.matrix(f"{prefix}q_up.weight"),
            "kv_down": self.trunk.matrix(f"{prefix}kv_down.weight"),
            "kv_up": self.trunk.matrix(f"{prefix}kv_up.weight"),
            "out": self.trunk.matrix(f"{prefix}out.weight"),
            "query_norm": None if whole else self._norm(f"{prefix}q_down_norm", norm),
            "kv_norm": self._norm(f"{prefix}kv_down_norm", norm),
            "query_down_bias": self._vector(f"{prefix}q_down.bias"),
            "kv_down_bias": self._vector(f"{prefix}kv_down.bias"),
            "out_bias": self._vector(f"{prefix}out.bias"),
            "rope": self._rope(config.rope),
            "indexer": None if config.indexer is None else self._indexer(f"{prefix}indexer.", config.indexer),
            "num_heads": config.num_heads,
            "kv_rank": config.kv_rank,
            "nope_dim": config.nope_dim,
            "rope_dim": config.rope_dim,
            "value_dim": config.value_dim,
            "scale": config.scale,
        }

    def _indexer(self, prefix: str, config: IndexerConfig) -> dict[str, Any]:
        own, norm = not config.shared, NormConfig("layer", 1e-6, bias=True)
        return {
            "is_shared": config.shared,
            "query_up": self.trunk.matrix(f"{prefix}q_up.weight") if own else None,
            "key": self.trunk.matrix(f"{prefix}k.weight") if own else None,
            "head_weights": self.trunk.matrix(f"{prefix}head_weights.weight") if own else None,
            "key_norm": self._norm(f"{prefix}k_norm", norm) if own else None,
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "top_k": config.top_k,
            "is_interleaved": config.pairing == "interleaved",
        }

    def _rope(self, rope: RopeConfig | None) -> dict[str, Any]:
        if rope is None:
            return {"cos": 0, "sin": 0, "dim": 0, "is_interleaved": False}
        if rope not in self._ropes:  # untouched memory costs nothing until `prepare` fills it
            shape = (self.config.max_context, rope.dim // 2)
            self._ropes[rope] = untouched_floats(*shape), untouched_floats(*shape)
        cos, sin = self._ropes[rope]
        interleaved = rope.pairing == "interleaved"
        return {"cos": cos.data_ptr(), "sin": sin.data_ptr(), "dim": rope.dim, "is_interleaved": interleaved}

    # ---------------------------------------------------------------------------------------------- feed-forward

    def _feed_forward(self, prefix: str, config: FeedForwardConfig) -> dict[str, Any]:
        alpha, limit = config.clamp or (0.0, 0.0)
        return {
            "gate": self.trunk.matrix(f"{prefix}gate.weight") if config.gated else None,
            "up": self.trunk.matrix(f"{prefix}up.weight"),
            "down": self.trunk.matrix(f"{prefix}down.weight"),
            "gate_bias": self._vector(f"{prefix}gate.bias"),
            "up_bias": self._vector(f"{prefix}up.bias"),
            "down_bias": self._vector(f"{prefix}down.bias"),
            "activation": ACTIVATIONS[config.activation],
            "alpha": alpha,
            "limit": limit,
        }

    def _moe(self, prefix: str, config: MoEConfig) -> dict[str, Any]:
        gated = config.shared_gate
        return {
            "router": self._router(f"{prefix}router.", config.router),
            "experts": expert_layout(self._layouts[f"{prefix}experts."], config.expert),
            "shared": None if config.shared is None else self._feed_forward(f"{prefix}shared.", config.shared),
            "shared_gate": self.trunk.matrix(f"{prefix}shared_gate.weight") if gated else None,
        }

    def _router(self, prefix: str, config: RouterConfig) -> dict[str, Any]:
        groups = config.groups
        return {
            "weight": self.trunk.matrix(f"{prefix}weight"),
            "bias": self._vector(f"{prefix}bias"),
            "select_bias": self._vector(f"{prefix}select_bias"),
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "score": _SCORES[config.score],
            "renormalize": config.renormalize,
            "is_input_weighted": config.weight_on == "input",
            "renormalize_eps": config.renormalize_eps,
            "scale": config.scale,
            "jitter": config.jitter,
            "num_groups": 0 if groups is None else groups.num_groups,
            "top_groups": 0 if groups is None else groups.top_groups,
            "groups_by_max": groups is not None and groups.score == "max",
        }

    # ---------------------------------------------------------------------------------------------------- vectors

    def _norm(self, name: str, norm: NormConfig | None = None) -> dict[str, Any]:
        norm = norm or self.config.norm
        weight = self._vector(f"{name}.weight", 1.0 if norm.offset else 0.0)
        return {
            "weight": weight,
            "bias": self._vector(f"{name}.bias"),
            "is_layer": norm.kind == "layer",
            "eps": norm.eps,
        }

    def _vector(self, name: str, offset: float = 0.0) -> int:
        """The address of a vector as float32; 0 where the model has none."""
        if name not in self.trunk:
            return 0
        values = self.trunk.values(name).contiguous()
        self.tensors.append(values + offset if offset else values)
        return self.tensors[-1].data_ptr()


def expert_layout(layer: ExpertLayer, config: FeedForwardConfig) -> dict[str, Any]:
    """Where the parts of an expert lie within its record (native/include/model.hpp: ExpertLayout)."""
    offsets = {(part.name, part.kind): part.offset for part in layer.parts}
    placed = {each.name: each for each in layer.matrices}

    def matrix(name: str) -> tuple[int, int, int, int, int] | None:
        if name not in placed:
            return None
        rows, columns = placed[name].shape
        return (
            NATIVE_FORMATS[placed[name].format],
            offsets[name, "codes"],
            offsets.get((name, "scales"), 0),
            rows,
            columns,
        )

    def vector(name: str) -> tuple[int, int, int] | None:
        if name not in placed:
            return None
        return NATIVE_FORMATS[placed[name].format], offsets[name, "codes"], placed[name].shape[0]

    alpha, limit = config.clamp or (0.0, 0.0)
    matrices = {name: matrix(name) for name in ("gate", "up", "down")}
    return matrices | {
        "gate_bias": vector("gate_bias"),
        "up_bias": vector("up_bias"),
        "down_bias": vector("down_bias"),
        "activation": ACTIVATIONS[config.activation],
        "alpha": alpha,
        "limit": limit,
        "record_bytes": layer.record_bytes,
        "num_experts": layer.num_experts,
    }
