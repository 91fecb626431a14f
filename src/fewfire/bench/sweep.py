"""Total decides memory, active decides speed: shown on small random packs, one figure held and the other moved.

Packs are made in a temporary folder, measured, and deleted.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewfire.bench.run import bench
from fewfire.checkpoints.pack_writer import write_pack
from fewfire.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from fewfire.plan.count import count
from fewfire.plan.limits import rss_bytes
from fewfire.plan.memory import choose_formats, weight_bytes
from fewfire.quantize import RandomWeights
from fewfire.runtime.packed import load_pack

VOCAB = 1024


@dataclass(frozen=True)
class SweepRow:
    """One pack. `resident_bytes`: by how much loading it made the process grow."""

    num_experts: int
    top_k: int
    total: int
    active: int
    pack_bytes: int
    resident_bytes: int
    bytes_per_token: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    predicted_decode_tokens_per_s: float | None
    drift: float


@dataclass(frozen=True)
class Sweep:
    """`by_active`: one total, more experts a token. `by_total`: one number of active parameters, more experts."""

    by_active: tuple[SweepRow, ...]
    by_total: tuple[SweepRow, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sweep_config(num_experts: int, top_k: int, *, model_dim: int, expert_dim: int, layers: int) -> ModelConfig:
    """A small decoder that is nearly all experts."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, rope=RopeConfig(10_000.0, 64))
    router = RouterConfig(num_experts, top_k, "softmax", renormalize=True, scale=1.0, select_bias=False)
    layer = LayerConfig(attention, MoEConfig(router, FeedForwardConfig(expert_dim, "silu", gated=True)))
    return ModelConfig("fewfire", VOCAB, model_dim, (layer,) * layers, NormConfig("rms", 1e-5), False, 1024)


def sweep(
    *,
    model_dim: int = 1024,
    expert_dim: int = 1024,
    layers: int = 4,
    experts: tuple[int, ...] = (8, 16, 32, 64),
    top_ks: tuple[int, ...] = (1, 2, 4, 8),
    prompt_tokens: int = 256,
    new_tokens: int = 128,
    say: Callable[[str], None] = lambda message: None,
) -> Sweep:
    """Measure packs of `max(experts) // 2` experts with each of `top_ks`, and of each of `experts` with top 2."""
    shape = {"model_dim": model_dim, "expert_dim": expert_dim, "layers": layers}
    held = max(max(experts) // 2, max(top_ks))

    def measure(num_experts: int, top_k: int) -> SweepRow:
        config = sweep_config(num_experts, top_k, **shape)
        say(f"{num_experts} experts, {top_k} a token ...")
        with tempfile.TemporaryDirectory(prefix="fewfire-sweep-") as folder:
            return _measure(config, Path(folder) / "pack", prompt_tokens, new_tokens)

    return Sweep(
        by_active=tuple(measure(held, top_k) for top_k in top_ks),
        by_total=tuple(measure(num_experts, 2) for num_experts in experts),
    )


def _measure(config: ModelConfig, path: Path, prompt_tokens: int, new_tokens: int) -> SweepRow:
    formats = choose_formats(config, "q4")
    write_pack(path, RandomWeights(config, 0), formats, origin="random weights of a sweep")
    gc.collect()
    before = rss_bytes()
    module = load_pack(path)
    resident = rss_bytes() - before
    del module
    gc.collect()
    made = bench(path, prompt_tokens=prompt_tokens, new_tokens=new_tokens, routing="uniform")
    gc.collect()
    counts, router = count(config), config.moe_layers[0][2].router
    return SweepRow(
        num_experts=router.num_experts,
        top_k=router.top_k,
        total=counts.total,
        active=counts.active_excluding_embedding,
        pack_bytes=weight_bytes(config, formats).total,
        resident_bytes=resident,
        bytes_per_token=made.bytes_per_token,
        decode_tokens_per_s=made.decode_tokens_per_s,
        prefill_tokens_per_s=made.prefill_tokens_per_s,
        predicted_decode_tokens_per_s=made.predicted_decode_tokens_per_s,
        drift=made.drift,
    )
