"""What a pack's model becomes for the native engine: matrices by address, numbers beside them; or why it cannot.

Owns the choice of what runs natively. Knows the engine's specification (native/include/engine.hpp), not its steps.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

from fewfire.checkpoints.pack import EXPERTS, Pack, checksum, cut_record, record_name
from fewfire.checkpoints.shards import Shards
from fewfire.config import AttentionConfig, FeedForwardConfig, LayerConfig, MoEConfig, RopeConfig
from fewfire.errors import FormatError
from fewfire.formats import Encoded, decode
from fewfire.headers import TensorHeader
from fewfire.kernels.linear import NATIVE_FORMATS
from fewfire.model.rope import cos_sin

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2}
_SCORES = {"softmax": 0, "softmax_selected": 1, "sigmoid": 2, "sigmoid_selected": 3}
_ROPE_STEP = 1024  # positions whose angles are computed at a time


def why_not_native(pack: Pack) -> str | None:
    """Why a pack's model needs torch, in a few words; None where every step of it is native."""
    config = pack.config
    foreign = sorted({each.format for each in _placed(pack)} - NATIVE_FORMATS.keys())
    if foreign:
        return f"weights in {', '.join(foreign)} have no kernel yet"
    if config.encoder or config.learned_positions is not None or config.head_bias:
        return "an encoder, learned positions and a head with bias have no native step yet"
    if config.norm.kind != "rms" or config.norm.offset or config.norm.bias:
        return "norms other than RMSNorm have no native step yet"
    if config.sandwich or config.normed_residual is not None:
        return "norms after the blocks have no native step yet"
    if len({layer.ffn.router.top_k for layer in config.layers if isinstance(layer.ffn, MoEConfig)}) > 1:
        return "layers with different numbers of chosen experts have no native step yet"
    return next((why for layer in config.layers if (why := _why_not_layer(layer)) is not None), None)


def _placed(pack: Pack) -> list[Any]:
    return [*pack.layout.trunk, *(each for layer in pack.layout.experts for each in layer.matrices)]


def _why_not_layer(layer: LayerConfig) -> str | None:
    mixer, ffn = layer.mixer, layer.ffn
    if not isinstance(mixer, AttentionConfig) or layer.cross is not None:
        return f"{type(mixer).__name__.removesuffix('Config')} has no native step yet"
    odd = mixer.chunk, mixer.logit_cap, mixer.temperature, mixer.relative_bias
    if any(each is not None for each in odd) or mixer.output_gate or mixer.qk_norm == "l2" or not mixer.causal:
        return "attention with chunks, caps, gates or biases by distance has no native step yet"
    if mixer.head_dim % 16:
        return f"heads of {mixer.head_dim} have no native step yet (a multiple of 16 has)"
    if mixer.rope is not None and mixer.rope.scaling is not None and mixer.rope.scaling.kind in ("dynamic", "longrope"):
        return f"{mixer.rope.scaling.kind} positions depend on the length of the text"
    if isinstance(ffn, MoEConfig):
        router = ffn.router
        if router.score not in _SCORES or router.groups or router.branches or router.capacity is not None:
            return f"the router rule ({router.score}, with groups, branches or capacity) has no native step yet"
        if router.weight_on != "output":
            return "routing weights on the input have no native step yet"
        parts = [ffn.expert, *([] if ffn.shared is None else [ffn.shared])]
    else:
        assert isinstance(ffn, FeedForwardConfig)
        parts = [ffn]
    if any(part.activation not in _ACTIVATIONS or part.bias for part in parts):
        return "feed-forwards with biases or another activation have no native step yet"
    return None


class Lowered:
    """A pack in memory and its specification. `spec` holds addresses into `tensors`: keep this object alive.

    Raises: FormatError where bytes are not those written.
    """

    def __init__(self, pack: Pack):
        self.pack, self.config = pack, pack.config
        self.tensors: list[Tensor] = []
        self.trunk: dict[str, Encoded] = {}
        self.expert_bytes = pack.layout.expert_bytes
        self.num_bytes = pack.num_bytes
        self._placed = {each.name: each for each in pack.layout.trunk}
        self._ropes: dict[RopeConfig, tuple[Tensor, Tensor]] = {}
        self._roped = 0
        with Shards() as shards:
            self.trunk = {each.name: pack.read_trunk(each, shards) for each in pack.layout.trunk}
            records = [_read_layer(pack, number, shards) for number in range(len(pack.layout.experts))]
        self._records = {layer.prefix: values for layer, values in zip(pack.layout.experts, records, strict=True)}
        self._layouts = {layer.prefix: layer for layer in pack.layout.experts}
        self.spec = self._model()

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

    # ------------------------------------------------------------------------------------------- specification

    def _model(self) -> dict[str, Any]:
        config = self.config
        embed = self._matrix("embed.weight")
        return {
            "model_dim": config.model_dim,
            "vocab_size": config.vocab_size,
            "eps": config.norm.eps,
            "embed_scale": config.embed_scale,
            "logit_scale": config.logit_scale,
            "residual_scale": config.residual_scale,
            "embed": embed,
            "head": embed if config.tied_head else self._matrix("head.weight"),
            "norm": self._vector("norm.weight"),
            "layers": [self._layer(f"layers.{index}.", layer) for index, layer in enumerate(config.layers)],
        }

    def _layer(self, prefix: str, layer: LayerConfig) -> dict[str, Any]:
        assert isinstance(layer.mixer, AttentionConfig)
        moe = isinstance(layer.ffn, MoEConfig)
        return {
            "attention_norm": self._vector(f"{prefix}attention_norm.weight"),
            "ffn_norm": self._vector(f"{prefix}ffn_norm.weight"),
            "attention": self._attention(f"{prefix}attention.", layer.mixer),
            "moe": self._moe(f"{prefix}ffn.", layer.ffn) if isinstance(layer.ffn, MoEConfig) else None,
            "dense": None if moe else self._feed_forward(f"{prefix}ffn.", layer.ffn),
        }

    def _attention(self, prefix: str, config: AttentionConfig) -> dict[str, Any]:
        cos, sin = (None, None) if config.rope is None else self._angles(config.rope)
        names = {"query": "q", "key": "k", "value": "v", "out": "out"}
        spec: dict[str, Any] = {name: self._matrix(f"{prefix}{ours}.weight") for name, ours in names.items()}
        spec |= {f"{name}_bias": self._vector(f"{prefix}{ours}.bias") for name, ours in names.items()}
        return spec | {
            "query_norm": self._vector(f"{prefix}q_norm.weight"),
            "key_norm": self._vector(f"{prefix}k_norm.weight"),
            "sinks": self._vector(f"{prefix}sinks"),
            "norm_is_full": config.qk_norm == "full",
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "window": config.window or 0,
            "rope_dim": 0 if config.rope is None else config.rope.dim,
            "rope_is_interleaved": config.rope is not None and config.rope.pairing == "interleaved",
            "scale": config.scale,
            "clip": config.clip_qkv or 0.0,
            "cos": 0 if cos is None else cos.data_ptr(),
            "sin": 0 if sin is None else sin.data_ptr(),
        }

    def _feed_forward(self, prefix: str, config: Any) -> dict[str, Any]:
        assert isinstance(config, FeedForwardConfig)
        gate = self._matrix(f"{prefix}gate.weight") if config.gated else None
        return {
            "gate": gate,
            "up": self._matrix(f"{prefix}up.weight"),
            "down": self._matrix(f"{prefix}down.weight"),
            "activation": _ACTIVATIONS[config.activation],
        }

    def _moe(self, prefix: str, config: MoEConfig) -> dict[str, Any]:
        router = config.router
        bank = f"{prefix}experts."
        return {
            "router": self._matrix(f"{prefix}router.weight"),
            "router_bias": self._vector(f"{prefix}router.bias"),
            "select_bias": self._vector(f"{prefix}router.select_bias"),
            "top_k": router.top_k,
            "score": _SCORES[router.score],
            "renormalize": router.renormalize,
            "renormalize_eps": router.renormalize_eps,
            "scale": router.scale,
            "experts": [self._expert(bank, expert, config.expert) for expert in range(router.num_experts)],
            "shared": None if config.shared is None else self._feed_forward(f"{prefix}shared.", config.shared),
            "shared_gate": self._matrix(f"{prefix}shared_gate.weight") if config.shared_gate else None,
        }

    def _expert(self, bank: str, expert: int, config: FeedForwardConfig) -> dict[str, Any]:
        layer = self._layouts[bank]
        record = self._records[bank][expert * layer.record_bytes : (expert + 1) * layer.record_bytes]
        spec: dict[str, Any] = {"gate": None, "activation": _ACTIVATIONS[config.activation]}
        for placed in layer.matrices:
            cut = cut_record(layer, record, placed.name)
            spec[placed.name] = _address(cut, placed.format, placed.shape)
        return spec

    def _matrix(self, name: str) -> tuple[int, int, int, int, int]:
        placed = self._placed[name]
        return _address(self.trunk[name], placed.format, placed.shape)

    def _vector(self, name: str) -> int:
        """The address of a vector as float32; 0 where the model has none."""
        if name not in self._placed:
            return 0
        placed = self._placed[name]
        values = decode(self.trunk[name], placed.format, placed.shape).contiguous()
        self.tensors.append(values)
        return values.data_ptr()

    def _angles(self, rope: RopeConfig) -> tuple[Tensor, Tensor]:
        if rope not in self._ropes:  # untouched memory costs nothing until `prepare` fills it
            shape = (self.config.max_context, rope.dim // 2)
            self._ropes[rope] = torch.empty(shape), torch.empty(shape)
        return self._ropes[rope]


def _address(encoded: Encoded, name: str, shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    scales = encoded.scales.data_ptr() if encoded.scales.numel() else 0
    return NATIVE_FORMATS[name], encoded.codes.data_ptr(), scales, rows, shape[-1]


def _read_layer(pack: Pack, number: int, shards: Shards) -> Tensor:
    """All records of one MoE layer in memory of their own, in huge pages where the system gives them; checked."""
    layer = pack.layout.experts[number]
    size = layer.num_experts * layer.record_bytes
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=torch.uint8)
    path = pack.folder / EXPERTS
    shards.read_into(TensorHeader(layer.prefix, "U8", (size,), path, layer.offset, size), values)
    for expert in range(layer.num_experts):
        record = values[expert * layer.record_bytes : (expert + 1) * layer.record_bytes]
        if checksum(record) != pack.expert_checksum(number, expert):
            message = "is not what was written (its checksum differs); copy or make the pack again"
            where = layer.record_offset(expert)
            raise FormatError(message, path=str(path), record=record_name(layer, expert), offset=where)
    return values
