"""Memory of a running pack, part by part, as the native engine takes it: what `--memory` is compared with.

Mirrors native/include/workspace.hpp, step.hpp and experts.hpp; tests/test_budget.py holds the two together. Bytes.
N tokens of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
)

PAGE_TOKENS = 64
GROUP, ROWS = 128, 16
_MOST_BLOCKS, _PANEL_GROUPS, _TOGETHER, _RUNS = 4, 2, 768, 8  # native/include/quantized.hpp
# native/experts.cpp, native/residency.cpp; a slot is one token of one expert, but for the window's
_BATCH_SLOTS, _CACHED_TOKENS = 1024, 256
LOOSE_SLOTS = 512  # of a layer, beyond which its experts run in order
DENSE_SLOTS = 6  # an expert, from which the next layer's experts are read ahead
WINDOW_SLOTS = 16  # of memory, that experts of a prompt pass through
_LATENT_TOKENS = 64  # native/latent.cpp
CHUNKS = (2048, 1024, 512, 256, 128)  # tokens of a prefill step, the largest that memory allows


def row_stride(width: int) -> int:
    """Numbers between rows of `width`: never a multiple of 2 KiB."""
    rounded = -(-width // 16) * 16
    return rounded + 16 if rounded % 512 == 0 else rounded


def tile_bytes(columns: int) -> int:
    """Codes, scales, sums and wide quads of one token."""
    return ceil(columns / GROUP) * (GROUP + 4 + 13 * 4 + 8)


def _rows(count: int, columns: int) -> int:
    return count * (4 * row_stride(columns) + tile_bytes(columns))


def runs_natively(config: ModelConfig) -> bool:
    """Whether the native engine has every kind of layer of it (runtime/lower.py asks more closely)."""
    mixers = all(isinstance(layer.mixer, AttentionConfig | LatentAttentionConfig) for layer in config.layers)
    return mixers and not config.encoder and config.normed_residual is None


# ------------------------------------------------------------------------------------------------------------ cache


def page_bytes(config: ModelConfig, *, element_bytes: int = 2) -> int:
    """One page of the native cache: 64 tokens of one sequence in all layers; element_bytes 1 is q8, with its scales."""
    return sum(-(-_layer_page(layer, element_bytes) // 64) * 64 for layer in config.layers)


def _layer_page(layer: LayerConfig, element_bytes: int) -> int:
    scales = 2 * PAGE_TOKENS * 4 if element_bytes == 1 else 0
    match layer.mixer:
        case AttentionConfig():
            head = PAGE_TOKENS * 2 * layer.mixer.head_dim * element_bytes + scales
            return layer.mixer.num_kv_heads * head
        case LatentAttentionConfig():
            indexer = layer.mixer.indexer
            keys = 0 if indexer is None or indexer.shared else PAGE_TOKENS * indexer.head_dim * 2
            return PAGE_TOKENS * (layer.mixer.kv_rank + layer.mixer.rope_dim) * element_bytes + scales + keys
        case _:
            return 0


def paged_cache_bytes(config: ModelConfig, context: int, batch: int = 1, *, element_bytes: int = 2) -> int:
    """The cache of `batch` sequences of `context` tokens: whole pages."""
    return batch * ceil(context / PAGE_TOKENS) * page_bytes(config, element_bytes=element_bytes)


# ---------------------------------------------------------------------------------------------------------- scratch


def workspace_bytes(config: ModelConfig, num_tokens: int, context: int) -> int:
    """Arrays of one step over N tokens: each is as large as the layer that wants most of it."""
    n, dim = num_tokens, config.model_dim
    parts: dict[str, int] = {"x": 4 * n * row_stride(dim), "sums": 4 * n * row_stride(dim), "normed": _rows(n, dim)}
    for layer in config.layers:
        for name, size in _layer_arrays(layer, n, dim, context):
            parts[name] = max(parts.get(name, 0), size)
    return sum(parts.values())


def _layer_arrays(layer: LayerConfig, n: int, dim: int, context: int) -> Iterator[tuple[str, int]]:
    match layer.mixer:
        case AttentionConfig():
            yield from _attention_arrays(layer.mixer, n)
        case LatentAttentionConfig():
            yield from _latent_arrays(layer.mixer, n, dim, context)
    match layer.ffn:
        case MoEConfig():
            yield from _moe_arrays(layer.ffn, n, dim)
        case FeedForwardConfig():
            yield from _dense_arrays(layer.ffn, n)


def _attention_arrays(mixer: AttentionConfig, n: int) -> Iterator[tuple[str, int]]:
    query = mixer.num_heads * mixer.head_dim * (2 if mixer.output_gate else 1)
    yield "projected", 4 * n * row_stride(query + 2 * mixer.num_kv_heads * mixer.head_dim)
    yield "mixed", _rows(n, mixer.num_heads * mixer.head_dim)


def _latent_arrays(mixer: LatentAttentionConfig, n: int, dim: int, context: int) -> Iterator[tuple[str, int]]:
    key, heads = mixer.kv_rank + mixer.rope_dim, mixer.num_heads
    yield "projected", 4 * n * (row_stride(heads * (mixer.nope_dim + mixer.rope_dim)) + row_stride(key))
    yield "mixed", _rows(n, heads * mixer.value_dim)
    yield "absorbed", 4 * min(n, _LATENT_TOKENS) * heads * (key + mixer.kv_rank)
    if mixer.q_rank is not None:
        yield "latent", _rows(n, mixer.q_rank)
    index = mixer.indexer
    if index is not None and not index.shared:
        yield "sums", 4 * n * max(row_stride(index.head_dim), row_stride(dim))
        if context > index.top_k:
            numbers = row_stride(index.num_heads * index.head_dim) + row_stride(index.num_heads) + row_stride(context)
            yield "index_scores", 4 * n * numbers
            yield "selected", 8 * n * ceil(context / PAGE_TOKENS)


def _dense_arrays(ffn: FeedForwardConfig, n: int) -> Iterator[tuple[str, int]]:
    yield "hidden", _rows(n, ffn.hidden_dim)
    if ffn.gated:
        yield "gates", 4 * n * row_stride(ffn.hidden_dim)


def _moe_arrays(moe: MoEConfig, n: int, dim: int) -> Iterator[tuple[str, int]]:
    router, slots = moe.router, n * moe.router.top_k
    yield "logits", 4 * n * router.num_experts
    yield "chosen", 8 * slots
    yield "order", 8 * slots + 64 * router.num_experts
    yield "expert_hidden", _rows(min(slots, _BATCH_SLOTS), moe.expert.hidden_dim)
    yield "outs", 4 * min(slots, LOOSE_SLOTS) * row_stride(dim)
    if moe.shared is not None:
        yield from _dense_arrays(moe.shared, n)
        yield "weighted", 4 * n * row_stride(dim)
    guessed = min(n, 16)  # tokens of a step that may look ahead
    yield "guess", _rows(guessed, dim) + 4 * guessed * router.num_experts


def linear_scratch(columns: int, num_tokens: int) -> int:
    """A thread's own room for one product."""
    groups, together = ceil(columns / GROUP), min(num_tokens, _TOGETHER)
    scales = (_MOST_BLOCKS * _PANEL_GROUPS + groups) * _RUNS * ROWS * 4
    panels = _MOST_BLOCKS * _PANEL_GROUPS * GROUP * ROWS + 2 * scales
    wide = together * (groups * 24 + _MOST_BLOCKS * ROWS * 4 + 1)
    return panels + 2 * together * _MOST_BLOCKS * ROWS * 4 + together * groups * _RUNS * 4 + wide + 1024


def thread_bytes(config: ModelConfig, num_tokens: int) -> int:
    """The most that one thread keeps beside the workspace."""
    n, dim, most = num_tokens, config.model_dim, 0
    for layer in config.layers:
        widths = [dim]
        if isinstance(layer.mixer, AttentionConfig):
            widths.append(layer.mixer.num_heads * layer.mixer.head_dim)
        if isinstance(layer.mixer, LatentAttentionConfig):
            widths += [layer.mixer.num_heads * layer.mixer.value_dim, layer.mixer.q_rank or 0]
        if isinstance(layer.ffn, FeedForwardConfig):
            widths.append(layer.ffn.hidden_dim)
        if isinstance(layer.ffn, MoEConfig):
            widths.append(0 if layer.ffn.shared is None else layer.ffn.shared.hidden_dim)
            rows, width = min(n * layer.ffn.router.top_k, _BATCH_SLOTS, n), layer.ffn.expert.hidden_dim
            made = 2 * min((rows + 1) * row_stride(width), (GROUP + 16) * max(rows + 1, 2 * _CACHED_TOKENS))
            inner = 4 * made + rows * tile_bytes(dim) + linear_scratch(dim, rows)
            outer = 4 * (rows + 1) * row_stride(dim) + linear_scratch(width, rows)
            most = max(most, inner, outer)
        most = max(most, *(linear_scratch(width, n) for width in widths))
    return most + 256


def rope_bytes(config: ModelConfig, context: int) -> int:
    """Angles of the first `context` positions, for each kind of rotation."""
    ropes = {getattr(layer.mixer, "rope", None) for layer in config.layers}
    return sum(4 * rope.dim * min(context, config.max_context) for rope in ropes if rope is not None)


def step_bytes(config: ModelConfig, num_tokens: int, context: int, threads: int) -> int:
    """All that a step over N tokens writes besides the cache: workspace, threads' room, angles, what it gives back."""
    results = 8 * num_tokens * config.model_dim
    own = workspace_bytes(config, num_tokens, context) + threads * thread_bytes(config, num_tokens)
    return own + rope_bytes(config, context) + results
