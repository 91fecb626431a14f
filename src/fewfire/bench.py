"""How fast a pack runs here, beside what the machine could do: prefill and decode of random tokens, probes around them.

Knows the engine and the planner's counts, no terminal. T tokens.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewfire.checkpoints.pack import is_pack, open_pack
from fewfire.config import check
from fewfire.kernels.probe import int8_ops_per_s, read_bytes_per_s
from fewfire.plan.count import prefill_flops
from fewfire.plan.limits import peak_rss_bytes
from fewfire.plan.speed import bytes_per_step
from fewfire.plan.workload import Workload
from fewfire.runtime.engine import NativeDecoder
from fewfire.runtime.packed import load_pack

DRIFT = 0.10  # probes before and after may differ by this much


@dataclass(frozen=True)
class Bench:
    """One measurement. Shares are of what the probes of the same run found; `drift` is how far those differ.

    `bytes_per_token`: weights and cache that one decoded token reads, counted from the pack.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bytes_per_token: int
    bandwidth_share: float
    compute_share: float
    peak_rss_bytes: int
    load_s: float
    ram_read_bytes_per_s: float
    int8_ops_per_s: float
    drift: float
    invariant: bool
    prompt_tokens: int
    new_tokens: int
    batch: int
    threads: int
    invariant_reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    model: str | Path, *, prompt_tokens: int = 512, new_tokens: int = 64, context: int = 0, batch: int = 1
) -> Bench:
    """Load the pack `model`; time a prompt of `prompt_tokens`, then `new_tokens` of decode from a cache of `context`.

    `batch` sequences are decoded at once; speeds count all their tokens.
    Raises: ConfigError for what is no pack or exceeds the model's context, KernelUnavailable without the extension.
    """
    check(is_pack(model), f"{model} is no pack; `fewfire pack` or `fewfire init` makes one")
    check(
        prompt_tokens >= 1 and new_tokens >= 1 and batch >= 1 and context >= 0, "bench needs at least one token of each"
    )
    pack = open_pack(model)
    most = max(prompt_tokens, context + new_tokens + 1)
    check(most <= pack.config.max_context, f"{most} tokens exceed the model's context of {pack.config.max_context}")
    threads = torch.get_num_threads()
    int8, before = int8_ops_per_s(threads), read_bytes_per_s(threads)
    start = time.perf_counter()
    module = load_pack(model)
    load_s = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, pack.config.vocab_size, (batch, max(prompt_tokens, context + 1)), generator=generator)
    with torch.inference_mode():
        module.logits(module.hidden(ids[:1, :8])[:, -1])  # pages of code and weights are touched
        prefill_s = _prefill(module, ids[:1, :prompt_tokens])
        decode_s = _decode(module, ids, context, new_tokens)
    peak = peak_rss_bytes()  # before the probe's own memory is on top of the model's
    after = read_bytes_per_s(threads)
    bandwidth = (before + after) / 2
    seen = context + new_tokens // 2 if context + new_tokens > 1 else 1
    work = Workload.of(pack.config, pack.formats, max(seen, 1))
    step_bytes = bytes_per_step(work, batch)
    native = isinstance(module, NativeDecoder)
    return Bench(
        prefill_tokens_per_s=prompt_tokens / prefill_s,
        decode_tokens_per_s=batch * new_tokens / decode_s,
        bytes_per_token=round(step_bytes / batch),
        bandwidth_share=step_bytes * new_tokens / decode_s / bandwidth,
        compute_share=prefill_flops(pack.config, prompt_tokens) / prefill_s / int8,
        peak_rss_bytes=peak,
        load_s=load_s,
        ram_read_bytes_per_s=bandwidth,
        int8_ops_per_s=int8,
        drift=abs(after - before) / bandwidth,
        invariant=native,
        invariant_reason=None if native else "torch does the arithmetic",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        threads=threads,
    )


def _prefill(module: Any, ids_1T: torch.Tensor) -> float:
    start = time.perf_counter()
    module.logits(module.hidden(ids_1T, module.new_cache())[:, -1])
    return time.perf_counter() - start


def _decode(module: Any, ids_BT: torch.Tensor, context: int, new_tokens: int) -> float:
    """Seconds of `new_tokens` steps behind `context` cached tokens, each token the most likely one."""
    cache = module.new_cache()
    if context:
        module.hidden(ids_BT[:, :context], cache)
    next_B1 = ids_BT[:, context : context + 1]
    start = time.perf_counter()
    for _ in range(new_tokens):
        next_B1 = module.logits(module.hidden(next_B1, cache)[:, -1]).argmax(dim=-1, keepdim=True)
    return time.perf_counter() - start
