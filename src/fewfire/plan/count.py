"""Exact parameter arithmetic and FLOPs over a `ModelConfig`. Owns the two conventions of 'active'; knows no bytes.

total = experts + trunk; router and embedding are parts of the trunk. `active` counts every always-on tensor plus
`top_k` experts a layer, the input embedding included; `active_excluding_embedding` drops that table (a gather, no
arithmetic). A tied table is the head, so it stays in both. Extra stored tensors (multi-token prediction, scales,
buffers) are never in these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fewfire.config import (
    AttentionConfig,
    DeltaNetConfig,
    LatentAttentionConfig,
    LightningConfig,
    LstmConfig,
    MambaConfig,
    Mixer,
    ModelConfig,
)
from fewfire.plan.shapes import Block, blocks, decoder_blocks, encoder_blocks, outer_tensors


@dataclass(frozen=True)
class Counts:
    """Parameters by what they decide: `total` memory, `active` compute. Integers; `by_class` sums to `total`."""

    total: int
    active: int
    active_excluding_embedding: int
    experts: int
    trunk: int
    router: int
    embedding: int
    head: int
    active_experts: int
    by_class: dict[str, int] = field(compare=False)


def count(config: ModelConfig) -> Counts:
    """All counts of `config`, exact to the integer. Source: notes of `plan.shapes`; each family's published shapes."""
    by_class: dict[str, int] = {}
    active_experts = 0
    for _, copies, specs in blocks(config):
        for spec in specs:
            by_class[spec.kind] = by_class.get(spec.kind, 0) + spec.size * copies
            if spec.kind == "experts":
                active_experts += spec.active * copies
    for spec in outer_tensors(config):
        by_class[spec.kind] = by_class.get(spec.kind, 0) + spec.size
    total, experts = sum(by_class.values()), by_class.get("experts", 0)
    trunk, embedding = total - experts, by_class["embedding"]
    active = trunk + active_experts
    return Counts(
        total=total,
        active=active,
        active_excluding_embedding=active if config.tied_head else active - embedding,
        experts=experts,
        trunk=trunk,
        router=by_class.get("router", 0) + by_class.get("select_bias", 0),
        embedding=embedding,
        head=embedding if config.tied_head else by_class.get("head", 0),
        active_experts=active_experts,
        by_class=by_class,
    )


# ------------------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one token (a multiply-add is two). `total` = matmul + attention.

    `router` and `experts` are parts of `matmul`.
    """

    matmul: int
    attention: int
    router: int
    experts: int

    @property
    def total(self) -> int:
        return self.matmul + self.attention


def visible_tokens(mixer: AttentionConfig, context: int) -> int:
    """How many cached tokens a query reads: bounded by the window or the chunk."""
    bound = mixer.window if mixer.window is not None else mixer.chunk
    return context if bound is None else min(context, bound)


def mixer_flops(mixer: Mixer | None, context: int, *, absorbed: bool = True) -> int:
    """Scores and values of one query over `context` cached tokens, or one step of a recurrence; projections apart.

    `absorbed`: MLA works on the latents (decode), otherwise on expanded keys and values (prefill).
    """
    match mixer:
        case AttentionConfig():
            return 4 * mixer.num_heads * mixer.head_dim * visible_tokens(mixer, context)
        case LatentAttentionConfig():
            attended, index = context, 0
            if mixer.indexer is not None:
                attended = min(context, mixer.indexer.top_k)
                index = 0 if mixer.indexer.shared else 2 * mixer.indexer.num_heads * mixer.indexer.head_dim * context
            width = 2 * mixer.kv_rank + mixer.rope_dim
            if not absorbed:
                width = mixer.nope_dim + mixer.rope_dim + mixer.value_dim
            return 2 * mixer.num_heads * width * attended + index
        case DeltaNetConfig():
            return 7 * mixer.num_value_heads * mixer.key_dim * mixer.value_dim
        case LightningConfig():
            return 5 * mixer.num_heads * mixer.head_dim**2
        case MambaConfig():
            return 6 * mixer.inner_dim * mixer.state_dim
        case LstmConfig() | None:
            return 0


def _block_matmul(block: Block, *, skip_cross_kv: bool) -> tuple[int, int, int]:
    """(parameters multiplied with a token, the router's part, the experts'). Cross keys and values: once an input."""
    matmul = router = experts = 0
    for spec in block.specs:
        if skip_cross_kv and spec.name in ("cross.k.weight", "cross.v.weight"):
            continue
        matmul += spec.matmul
        router += spec.matmul if spec.kind == "router" else 0
        experts += spec.matmul if spec.kind == "experts" else 0
    return matmul, router, experts


def decode_flops(config: ModelConfig, context: int) -> Flops:
    """One generated token with `context` tokens cached: twice the matmul parameters it meets, plus attention.

    The embedding gather costs none. Of an encoder-decoder only the decoder runs per generated token; its
    cross-attention reads an input of `context` tokens too.
    """
    matmul = router = experts = attention = 0
    for block in decoder_blocks(config):
        layer, copies = block.layer, block.copies
        parts = _block_matmul(block, skip_cross_kv=True)
        matmul, router, experts = (each + part * copies for each, part in zip((matmul, router, experts), parts))
        attention += (mixer_flops(layer.mixer, context) + mixer_flops(layer.cross, context)) * copies
    matmul += sum(spec.matmul for spec in outer_tensors(config))
    return Flops(matmul=2 * matmul, attention=attention, router=2 * router, experts=2 * experts)


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """A prompt of `num_tokens`: the head runs once, attention over half the prompt on average.

    An encoder-decoder's prompt passes the encoder, whose tokens all see one another.
    """
    half = (num_tokens + 1) // 2
    per_token = 0
    for block in encoder_blocks(config) or decoder_blocks(config):
        matmul, _, _ = _block_matmul(block, skip_cross_kv=False)
        seen = num_tokens if config.encoder else half
        per_token += (2 * matmul + mixer_flops(block.layer.mixer, seen, absorbed=False)) * block.copies
    head = sum(spec.matmul for spec in outer_tensors(config))
    return per_token * num_tokens + 2 * head
