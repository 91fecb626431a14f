"""A GGUF file's shape as a ModelConfig that is good for planning: counts, cache, bytes. Not for running.

Reads llama.cpp's metadata keys and the shapes of the tensors; what no count depends on (router
arithmetic, scales, rope bases) is a placeholder.
"""

from __future__ import annotations

from typing import Any

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    MambaConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.errors import FormatError
from fewfire.headers import GgufHeader


class _Shape:
    """Metadata of one file under its architecture's prefix, with the tensors of one block at hand."""

    def __init__(self, header: GgufHeader):
        self.header, self.arch = header, header.architecture

    def get(self, key: str, default: int | None = None) -> int:
        """A whole number; of a list (one value a layer) the largest."""
        return self._whole(key, self.header.metadata.get(f"{self.arch}.{key}", default))

    def at_layer(self, key: str, layer: int, default: int | None = None) -> int:
        """A whole number of one layer, where the file lists one for each."""
        value: Any = self.header.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else 0
        return self._whole(key, value)

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, list) and all(type(each) is int for each in value):
            value = max(value, default=0)
        if type(value) is not int or not 0 <= value < 2**40:
            record = f"{self.arch}.{key}"
            message = f"is {str(value)[:60]!r}, expected a whole number"
            raise FormatError(message, path=str(self.header.path), record=record)
        return value

    def shape(self, layer: int, name: str) -> tuple[int, ...] | None:
        tensor = self.header.tensors.get(f"blk.{layer}.{name}")
        return tensor.shape if tensor else None

    def has(self, layer: int, *names: str) -> bool:
        return any(self.shape(layer, name) is not None for name in names)


def config_of_gguf(header: GgufHeader) -> ModelConfig:
    """The shape of a GGUF model. Raises FormatError naming the metadata key or tensor that is missing."""
    shape = _Shape(header)
    path = str(header.path)
    if not shape.arch:
        raise FormatError("is not there; it is no language model", path=path, record="general.architecture")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError("is not there; it is no whole model", path=path, record="token_embd.weight")
    num_layers = shape.get("block_count") - shape.get("nextn_predict_layers", 0)
    layers = tuple(_layer(shape, index, embedding.shape[1]) for index in range(num_layers))
    tied, biased = "output.weight" not in header.tensors, shape.has(0, "attn_norm.bias")
    positions = header.tensors.get("position_embd.weight")
    return ModelConfig(
        family=f"gguf:{shape.arch}",
        vocab_size=embedding.shape[0],
        model_dim=embedding.shape[1],
        layers=layers,
        norm=NormConfig("layer" if biased else "rms", 1e-5, bias=biased),
        tied_head=tied,
        max_context=shape.get("context_length", 131_072),
        learned_positions=positions.shape[0] if positions else None,
        sandwich=shape.has(0, "post_attention_norm.weight") and shape.has(0, "ffn_norm.weight"),
    )


def _layer(shape: _Shape, index: int, model_dim: int) -> LayerConfig:
    return LayerConfig(_mixer(shape, index, model_dim), _feed_forward(shape, index))


def _mixer(shape: _Shape, index: int, model_dim: int) -> Mixer | None:
    if shape.has(index, "attn_kv_a_mqa.weight"):
        return _latent(shape, index)
    if shape.has(index, "attn_q.weight", "attn_qkv.weight"):
        return _attention(shape, index, model_dim)
    if shape.has(index, "ssm_in.weight", "ssm_beta_alpha.weight", "ssm_ba.weight", "ssm_out.weight"):
        return _recurrent(shape, index)
    raise FormatError("has no attention that is known", path=str(shape.header.path), record=f"blk.{index}")


def _attention(shape: _Shape, index: int, model_dim: int) -> AttentionConfig:
    heads = shape.at_layer("attention.head_count", index)
    kv_heads = shape.at_layer("attention.head_count_kv", index, heads) or heads
    head_dim = shape.get("attention.key_length", model_dim // max(1, heads))
    query, norm = shape.shape(index, "attn_q.weight"), shape.shape(index, "attn_q_norm.weight")
    window = shape.get("attention.sliding_window", 0) if shape.arch == "gpt-oss" and index % 2 == 0 else 0
    chunk = shape.get("attention.chunk_size", 8192) if shape.arch == "llama4" and (index + 1) % 4 else 0
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=1.0,
        rope=RopeConfig(10_000.0, head_dim - head_dim % 2),
        window=window or None,
        chunk=chunk or None,
        qkv_bias=shape.has(index, "attn_q.bias", "attn_qkv.bias"),
        out_bias=shape.has(index, "attn_output.bias"),
        qk_norm=None if norm is None else "head" if norm[-1] == head_dim else "full",
        sinks=shape.has(index, "attn_sinks.weight", "attn_sinks"),
        output_gate=query is not None and query[0] == 2 * heads * head_dim,
    )


def _latent(shape: _Shape, index: int) -> LatentAttentionConfig:
    rope_dim, kv_rank = shape.get("rope.dimension_count"), shape.get("attention.kv_lora_rank")
    key_dim = shape.get("attention.key_length_mla", shape.get("attention.key_length", 192))
    q_rank = shape.get("attention.q_lora_rank", 0) or None
    return LatentAttentionConfig(
        num_heads=shape.get("attention.head_count"),
        q_rank=q_rank,
        kv_rank=kv_rank,
        nope_dim=key_dim - rope_dim,
        rope_dim=rope_dim,
        value_dim=shape.get("attention.value_length_mla", shape.get("attention.value_length", 128)),
        scale=1.0,
        rope=RopeConfig(10_000.0, rope_dim),
    )


def _recurrent(shape: _Shape, index: int) -> Mixer:
    inner, state = shape.get("ssm.inner_size"), shape.get("ssm.state_size")
    kernel = shape.get("ssm.conv_kernel")
    if shape.has(index, "ssm_x.weight"):
        return MambaConfig(
            inner_dim=inner,
            state_dim=state,
            conv_kernel=kernel,
            dt_rank=shape.get("ssm.time_step_rank"),
            conv_bias=shape.has(index, "ssm_conv1d.bias"),
            proj_bias=False,
        )
    value_heads, key_heads = shape.get("ssm.time_step_rank"), shape.get("ssm.group_count")
    return DeltaNetConfig(key_heads, value_heads, state, inner // max(1, value_heads), kernel)


def _width(shape: _Shape, index: int, *names: str) -> int | None:
    for name in names:
        found = shape.shape(index, name)
        if found is not None:
            return found[-2]
    return None


def _feed_forward(shape: _Shape, index: int) -> FeedForwardConfig | MoEConfig | None:
    width = _width(shape, index, "ffn_up_exps.weight", "ffn_gate_exps.weight")
    if width is None:
        dense = _width(shape, index, "ffn_up.weight")
        if dense is None:
            return None
        gated = shape.has(index, "ffn_gate.weight")
        return FeedForwardConfig(dense, "silu" if gated else "gelu", gated, shape.has(index, "ffn_up.bias"))
    gated = shape.has(index, "ffn_gate_exps.weight")
    router = RouterConfig(
        num_experts=shape.get("expert_count"),
        top_k=shape.get("expert_used_count"),
        score="softmax",
        renormalize=True,
        scale=1.0,
        select_bias=shape.has(index, "exp_probs_b.bias", "exp_probs_b"),
        bias=shape.has(index, "ffn_gate_inp.bias"),
    )
    shared = _width(shape, index, "ffn_up_shexp.weight")
    bias = shape.has(index, "ffn_up_exps.bias")
    return MoEConfig(
        router=router,
        expert=FeedForwardConfig(width, "silu", gated, bias),
        shared=None if shared is None else FeedForwardConfig(shared, "silu", True),
        shared_gate=shape.has(index, "ffn_gate_inp_shexp.weight"),
    )
