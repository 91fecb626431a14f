"""Bytes: weights per format and tensor class, KV cache, and the floor. Owns the sizes of formats; knows no device.

GB is 10^9 bytes, GiB 2^30. Formats are made of blocks of rows and columns; what is no multiple of the block is padded
to one, as it is on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, prod
from typing import NamedTuple

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    LatentAttentionConfig,
    LightningConfig,
    LstmConfig,
    MambaConfig,
    Mixer,
    ModelConfig,
    MoEConfig,
)
from fewfire.errors import ConfigError
from fewfire.plan.count import visible_tokens
from fewfire.plan.limits import usable_threads
from fewfire.plan.shapes import Block as LayerBlock
from fewfire.plan.shapes import TensorSpec, blocks, decoder_blocks, named_blocks, outer_tensors


class Block(NamedTuple):
    """What is stored together: `rows` x `columns` values in `num_bytes`. Matrices are padded to whole blocks."""

    columns: int
    num_bytes: int
    rows: int = 1


# As a pack lays them out (docs/formats.md).
FORMATS: dict[str, Block] = {
    "f32": Block(1, 4),
    "bf16": Block(1, 2),
    "fp16": Block(1, 2),
    "fp8": Block(1, 1),
    "q8": Block(128, 2048 + 32, 16),
    "q4": Block(128, 1024 + 96, 16),
    "mxfp4": Block(128, 1024 + 64, 16),
    "q4_0": Block(128, 1024 + 128, 16),
    "q4_1": Block(128, 1024 + 256, 16),
    "q8_0": Block(128, 2048 + 128, 16),
    "q4_k": Block(256, 2048 + 256, 16),
    "q6_k": Block(256, 3072 + 288, 16),
}
# How published checkpoints and GGUF files store what a pack lays out otherwise: row by row.
NATIVE_BLOCKS = {
    "mxfp4": Block(32, 17),
    "q4_0": Block(32, 18),
    "q4_1": Block(32, 20),
    "q8_0": Block(32, 34),
    "q4_k": Block(256, 144),
    "q6_k": Block(256, 210),
}
PLAN_ONLY = ("fp16", "fp8")  # no pack is made of these
UNQUANTIZED = ("f32", "bf16", "fp16")
RECORD_ALIGNMENT = 4096  # an expert's record in a pack is padded to a multiple of this
FORMAT_NAMES = (*FORMATS, "native")
FP8_SCALE_BLOCK = 128  # fp8 checkpoints carry one float32 scale for each 128 x 128 block
PROCESS_BYTES = 272 * 2**20  # Python, torch and our own code, resident, before any weight
TOKENIZER_BYTES = 1000  # for each entry of the vocabulary, while it is read
LOGIT_BYTES = 24  # for each entry of the vocabulary: a row of logits, and what sampling makes of it
TORCH_FLOAT32_BYTES = 4 * 2**30  # a trunk of more than this in float32 is dequantized to bfloat16
INDEX_KEY_BYTES = 132  # of an indexer with heads of 128: 128 fp8 values and one float32 scale, as engines store it


def bits_per_weight(format_name: str) -> float:
    """Bits one weight takes in `format_name`, scales included (q4: 4.375)."""
    block = FORMATS[format_name]
    return 8 * block.num_bytes / (block.rows * block.columns)


@dataclass(frozen=True)
class Formats:
    """Which format each part is stored in. `native` says the published checkpoint's own choice is meant.

    `overrides`: parameters by full name (`layers.0.ffn.experts.down`: of all experts) whose format is not their part's.
    """

    experts: str
    down: str
    trunk: str
    head: str
    router: str
    embedding: str
    small: str  # norms, biases and other vectors
    scaled: bool = False  # fp8 with float32 block scales
    native: bool = False
    overrides: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def packed(self) -> bool:
        """Whether a pack of these formats can be made: then sizes are the pack's own, padding included."""
        names = (self.experts, self.down, self.trunk, self.head, self.router, self.embedding, self.small)
        return not self.native and not any(name in PLAN_ONLY for name in names)

    def part(self, spec: TensorSpec) -> str:
        """The part that a tensor belongs to: the name of the field that says its format."""
        if spec.kind in ("router", "select_bias") or (spec.name.endswith("shared_gate.weight") and not self.native):
            return "router"  # a gate is a router of one row
        if not spec.matmul and spec.kind not in ("embedding", "positions"):
            return "small"
        if spec.kind == "experts":
            return "down" if spec.name.endswith(".down") else "experts"
        if spec.kind == "head" or (spec.kind == "embedding" and spec.matmul):
            return "head"
        return "embedding" if spec.kind in ("embedding", "positions") else "trunk"

    def of(self, spec: TensorSpec) -> str:
        """The format of one tensor. Where there are overrides, `spec` must have its full name."""
        if spec.kind == "select_bias":
            return "f32"
        if spec.name in self.overrides:
            return self.overrides[spec.name]
        if is_absorbed(spec) and self.packed and self.trunk not in UNQUANTIZED:
            return "bf16"
        name: str = getattr(self, self.part(spec))
        return name


def is_absorbed(spec: TensorSpec) -> bool:
    """Whether a matrix is multiplied with queries and outputs instead of tokens (MLA): a pack keeps it unquantized."""
    return spec.name.endswith("kv_up.weight")


def _check_format(name: str, key: str) -> str:
    if name not in FORMAT_NAMES:
        raise ConfigError(f"{key} ({name}) is not a format; choose one of {', '.join(FORMAT_NAMES)}")
    return name


def _native_formats(config: ModelConfig) -> Formats:
    name = _check_format(config.native_format, "native_format")
    if name in ("f32", "bf16", "fp16"):
        return Formats(name, name, name, name, name, name, name, native=True)
    rest = "bf16"
    trunk = "fp8" if name == "fp8" else rest
    return Formats(
        experts=name, down=name, trunk=trunk, head=rest, router=rest, embedding=rest, small=rest,
        scaled=name == "fp8", native=True,
    )  # fmt: skip


def choose_formats(
    config: ModelConfig,
    quant: str = "native",
    *,
    experts: str | None = None,
    trunk: str | None = None,
    down: str | None = None,
    head: str | None = None,
    stored: Formats | None = None,
) -> Formats:
    """Formats of every part: `quant` for all, the rest to set parts apart. `stored`: what a pack says is native to it.

    `q4`: experts q4, trunk q8, router f32. `mxfp4`: experts mxfp4, the rest bf16. Any other: all but the router,
    which stays f32. `native`: what the publisher stores. Raises ConfigError on an unknown name.
    """
    quant = _check_format(quant.lower(), "--quant")
    if quant == "native":
        formats = stored or _native_formats(config)
    else:
        rest = {"q4": "q8", "mxfp4": "bf16"}.get(quant, quant)
        small = {"bf16": "bf16", "fp16": "fp16", "fp8": "bf16", "mxfp4": "bf16"}.get(quant, "f32")
        router = "bf16" if quant == "mxfp4" else "f32"
        formats = Formats(quant, quant, rest, rest, router, rest, small)
    chosen = {"experts": experts, "down": down or experts, "trunk": trunk, "embedding": trunk, "head": head or trunk}
    changes = {key: _check_format(name.lower(), f"--{key}") for key, name in chosen.items() if name is not None}
    if "native" in changes.values():
        raise ConfigError("native is a format for the whole model only; name a format such as q8 or bf16 for a part")
    return Formats(**{**formats.__dict__, **changes, "native": formats.native and not changes})


def matrix_bytes(name: str, shape: tuple[int, ...], *, native: bool = False) -> int:
    """Bytes of a matrix (rows, columns) or a vector in format `name`; of (E, rows, columns), of E matrices."""
    block = NATIVE_BLOCKS.get(name, FORMATS[name]) if native else FORMATS[name]
    rows = shape[-2] if len(shape) > 1 else 1
    copies = prod(shape[:-2])
    return copies * ceil(rows / block.rows) * ceil(shape[-1] / block.columns) * block.num_bytes


def tensor_bytes(spec: TensorSpec, formats: Formats) -> int:
    """Bytes of one tensor, scales and padding included."""
    name = formats.of(spec)
    size = matrix_bytes(name, spec.shape, native=formats.native)
    if formats.scaled and name == "fp8":
        matrices = spec.shape[0] if len(spec.shape) == 3 else 1
        height = ceil(spec.shape[-2] / FP8_SCALE_BLOCK)
        size += 4 * matrices * height * ceil(spec.shape[-1] / FP8_SCALE_BLOCK)
    return size


def expert_bytes(specs: Iterable[TensorSpec], num_experts: int, formats: Formats) -> int:
    """Bytes of one expert of a layer, as a pack's record where one can be made; `specs` of other kinds are left out."""
    size = sum(tensor_bytes(spec, formats) for spec in specs if spec.kind == "experts") // num_experts
    return ceil(size / RECORD_ALIGNMENT) * RECORD_ALIGNMENT if formats.packed else size


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights. `experts` routed, `trunk` the rest; `embedding` its part that is only gathered from.

    `per_expert` is the largest single expert, `active_experts` the bytes of the experts that one token meets.
    """

    total: int
    experts: int
    trunk: int
    embedding: int
    per_expert: int
    active_experts: int
    by_class: dict[str, int]


def _layers(config: ModelConfig, formats: Formats, *, encoder: bool = True) -> tuple[LayerBlock, ...]:
    """Equal layers once; where formats name parameters, every layer apart, under its own names."""
    if formats.overrides:
        return named_blocks(config, encoder=encoder)
    return blocks(config) if encoder else decoder_blocks(config)


def weight_bytes(config: ModelConfig, formats: Formats) -> WeightBytes:
    """Bytes of every tensor class of `config` in `formats`."""
    by_class: dict[str, int] = {}
    active_experts = per_expert = 0
    for layer, copies, specs in _layers(config, formats):
        for spec in specs:
            if spec.kind != "experts":
                by_class[spec.kind] = by_class.get(spec.kind, 0) + tensor_bytes(spec, formats) * copies
        if isinstance(layer.ffn, MoEConfig):
            router = layer.ffn.router
            one = expert_bytes(specs, router.num_experts, formats)
            by_class["experts"] = by_class.get("experts", 0) + one * router.num_experts * copies
            per_expert = max(per_expert, one)
            active_experts += one * router.top_k * copies
    gathered = 0
    for spec in outer_tensors(config):
        size = tensor_bytes(spec, formats)
        by_class[spec.kind] = by_class.get(spec.kind, 0) + size
        gathered += size if spec.kind in ("embedding", "positions") and not spec.matmul else 0
    total, experts = sum(by_class.values()), by_class.get("experts", 0)
    return WeightBytes(total, experts, total - experts, gathered, per_expert, active_experts, by_class)


def decode_trunk_bytes(config: ModelConfig, formats: Formats) -> int:
    """Bytes of trunk that a decode step reads: the decoder's blocks and the head. An embedding is a gather, an encoder
    and the cross-attention's keys and values are done with once the input is in."""
    total = sum(tensor_bytes(spec, formats) for spec in outer_tensors(config) if spec.matmul or spec.kind == "norm")
    for _, copies, specs in _layers(config, formats, encoder=False):
        for spec in specs:
            if spec.kind != "experts" and not spec.name.endswith(("cross.k.weight", "cross.v.weight")):
                total += tensor_bytes(spec, formats) * copies
    return total


# ---------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class CacheBytes:
    """What one sequence keeps. `per_token`: growth in layers that see everything; `windowed`: reached at the bound.

    `index`: indexer keys a token. `state`: recurrent state, whatever the length; `conv`: last inputs of convolutions.
    """

    per_token: int
    index_per_token: int
    windowed: int
    state: int
    conv: int
    cross: int
    sequence: int  # all of it at the context asked about


def _mixer_cache(mixer: Mixer | None, context: int, element_bytes: int) -> tuple[int, int, int, int, int]:
    """(per token, index per token, windowed, state, conv) of one layer."""
    match mixer:
        case AttentionConfig():
            width = 2 * mixer.num_kv_heads * mixer.head_dim * element_bytes
            bounded = mixer.window is not None or mixer.chunk is not None
            return (0, 0, width * visible_tokens(mixer, context), 0, 0) if bounded else (width, 0, 0, 0, 0)
        case LatentAttentionConfig():
            indexer = mixer.indexer
            index = 0 if indexer is None or indexer.shared else indexer.head_dim + 4 * ceil(indexer.head_dim / 128)
            return (mixer.kv_rank + mixer.rope_dim) * element_bytes, index, 0, 0, 0
        case DeltaNetConfig():
            channels = 2 * mixer.num_key_heads * mixer.key_dim + mixer.num_value_heads * mixer.value_dim
            state = 4 * mixer.num_value_heads * mixer.key_dim * mixer.value_dim
            return 0, 0, 0, state, channels * mixer.conv_kernel * element_bytes
        case LightningConfig():
            return 0, 0, 0, 4 * mixer.num_heads * mixer.head_dim**2, 0
        case MambaConfig():
            return 0, 0, 0, 4 * mixer.inner_dim * mixer.state_dim, mixer.inner_dim * mixer.conv_kernel * element_bytes
        case LstmConfig():
            return 0, 0, 0, 8 * mixer.hidden_dim, 0
        case None:
            return 0, 0, 0, 0, 0


def cache_bytes(config: ModelConfig, context: int, *, element_bytes: int = 2) -> CacheBytes:
    """The cache of one sequence of `context` tokens, keys and values in `element_bytes` (2: bf16), state in float32.

    MLA keeps its latents, no heads and no factor two. Windowed and chunked layers stop growing at their bound. An
    encoder-decoder keeps the keys and values of an input of `context` tokens for its cross-attention as well.
    """
    sums = [0, 0, 0, 0, 0]
    cross = 0
    for layer, copies, _ in decoder_blocks(config):
        parts = _mixer_cache(layer.mixer, context, element_bytes)
        sums = [total + part * copies for total, part in zip(sums, parts, strict=True)]
        if layer.cross is not None:
            cross += 2 * layer.cross.num_kv_heads * layer.cross.head_dim * element_bytes * context * copies
    per_token, index, windowed, state, conv = sums
    sequence = (per_token + index) * context + windowed + state + conv + cross
    return CacheBytes(per_token, index, windowed, state, conv, cross, sequence)


def cache_read_bytes(config: ModelConfig, context: int, *, element_bytes: int = 2) -> int:
    """Bytes of cache that a decode step of one sequence reads; a sparse indexer reads its keys and `top_k` latents."""
    total = 0
    for layer, copies, _ in decoder_blocks(config):
        per_token, index, windowed, state, conv = _mixer_cache(layer.mixer, context, element_bytes)
        attended = context
        if isinstance(layer.mixer, LatentAttentionConfig) and layer.mixer.indexer is not None:
            attended = min(context, layer.mixer.indexer.top_k)
        read = per_token * attended + index * context + windowed + 2 * state + conv
        if layer.cross is not None:
            read += 2 * layer.cross.num_kv_heads * layer.cross.head_dim * element_bytes * context
        total += read * copies
    return total


# ---------------------------------------------------------------------------------------------------- the floor


@dataclass(frozen=True)
class Floor:
    """The least memory a run can do with: what `--memory` refuses below. `table` names each part."""

    table: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.table.values())


def activation_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Scratch of one step over `num_tokens` tokens, float32: the residual, its copies, the widest projections."""
    widest = config.model_dim
    for layer, _, specs in blocks(config):
        for spec in specs:
            if spec.matmul and spec.kind != "experts":
                widest = max(widest, spec.shape[0])
        if isinstance(layer.ffn, MoEConfig):
            widest = max(widest, layer.ffn.expert.hidden_dim * layer.ffn.router.top_k)
    return 4 * num_tokens * (4 * config.model_dim + 3 * widest)


def floor_bytes(
    config: ModelConfig,
    formats: Formats,
    context: int,
    batch: int = 1,
    *,
    weights: WeightBytes | None = None,
    cache_element_bytes: int = 2,
    threads: int | None = None,
) -> Floor:
    """Process + trunk + cache + scratch + the fewest experts a layer can run with, two layers' worth in flight.

    A dense model has no experts to leave on disk: its floor holds all weights. `weights` are the checkpoint's own
    bytes where they are known. `threads`: None is what this process may use. What the native engine does not run keeps
    its trunk dequantized.
    """
    from fewfire.plan import resident

    weights = weights or weight_bytes(config, formats)
    threads = usable_threads() if threads is None else threads
    most = max((moe.router.top_k for _, _, moe in config.moe_layers), default=0)
    chunk = max(batch, resident.CHUNKS[-1])
    native = resident.runs_natively(config)
    if native:
        cache = resident.paged_cache_bytes(config, context, batch, element_bytes=cache_element_bytes)
        scratch = resident.step_bytes(config, chunk, context, threads)
    else:
        cache = torch_cache_bytes(config, context) * batch
        scratch = activation_bytes(config, chunk)
    return Floor(
        {
            "process": PROCESS_BYTES,
            "tokenizer": TOKENIZER_BYTES * config.vocab_size,
            "trunk": weights.trunk if native else dequantized_trunk_bytes(config),
            "kv cache": cache,
            "experts in flight": 2 * most * weights.per_expert,
            "scratch": scratch + LOGIT_BYTES * config.vocab_size * batch,
        }
    )


def embedding_on_disk_bytes(config: ModelConfig, formats: Formats) -> int:
    """The input embedding, where the native engine reads its rows from disk beside streamed experts."""
    from fewfire.plan import resident

    if config.tied_head or not resident.runs_natively(config):
        return 0
    return sum(tensor_bytes(spec, formats) for spec in outer_tensors(config) if spec.kind == "embedding")


def dequantized_trunk_bytes(config: ModelConfig) -> int:
    """The trunk as torch keeps it, in float32 or bfloat16."""
    return _trunk_values(config) * torch_element_bytes(config)


def torch_element_bytes(config: ModelConfig) -> int:
    """Bytes of a number where torch runs the trunk of a pack: float32 up to 4 GiB of it, else bfloat16."""
    return 4 if 4 * _trunk_values(config) <= TORCH_FLOAT32_BYTES else 2


def torch_cache_bytes(config: ModelConfig, context: int) -> int:
    """One sequence's cache in torch, which grows by half again: the larger copy, and the smaller while it is made."""
    return cache_bytes(config, context, element_bytes=torch_element_bytes(config)).sequence * 5 // 2


def _trunk_values(config: ModelConfig) -> int:
    values = sum(prod(spec.shape) for spec in outer_tensors(config))
    return values + sum(
        prod(spec.shape) * copies for _, copies, specs in blocks(config) for spec in specs if spec.kind != "experts"
    )
