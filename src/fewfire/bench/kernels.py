"""Kernels alone: experts of one token and of many, a product, attention, each beside the machine's peak.

Attention runs within a step of the engine and is timed by its own clock, rotations and writing the cache included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewfire.checkpoints.pack import is_pack, open_pack
from fewfire.config import MoEConfig, check
from fewfire.errors import ConfigError
from fewfire.kernels.linear import NATIVE_FORMATS
from fewfire.kernels.probe import float_ops_per_s, int8_ops_per_s, product_ops_per_s
from fewfire.plan.count import mixer_flops
from fewfire.plan.phases import expert_layers
from fewfire.plan.workload import Workload
from fewfire.routing import Routing
from fewfire.runtime.banks import ResidentExperts
from fewfire.runtime.engine import CACHE_ELEMENT_BYTES, NativeDecoder
from fewfire.runtime.packed import load_pack
from fewfire.runtime.probe import read_own_bytes_per_s

_UNQUANTIZED = ("f32", "bf16")


@dataclass(frozen=True)
class KernelSpeed:
    """One kernel. Shares are of peaks probed in the same run: of int8 (or float32) arithmetic, of memory reads."""

    name: str
    tokens: int
    seconds: float
    ops_per_s: float
    compute_share: float
    bytes_per_s: float | None
    bandwidth_share: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Peaks:
    int8: float
    floats: float
    reads: float

    def speed(
        self, name: str, tokens: int, seconds: float, ops: float, num_bytes: float | None, *, is_int8: bool = True
    ) -> KernelSpeed:
        rate = None if num_bytes is None else num_bytes / seconds
        return KernelSpeed(
            name=name,
            tokens=tokens,
            seconds=seconds,
            ops_per_s=ops / seconds,
            compute_share=ops / seconds / (self.int8 if is_int8 else self.floats),
            bytes_per_s=rate,
            bandwidth_share=None if rate is None else rate / self.reads,
        )


def bench_kernels(
    model: str | Path, *, prompt_tokens: int = 512, context: int = 1024, cache: str = "bf16", seconds: float = 0.5
) -> list[KernelSpeed]:
    """Speeds of the kernels that the pack `model` uses, each timed for `seconds`.

    Raises: ConfigError for what is no pack, or a pack that does not run natively in memory.
    """
    check(is_pack(model), f"{model} is no pack; `fewfire pack` or `fewfire init` makes one")
    longest = open_pack(model).config.max_context
    context, prompt_tokens = min(context, longest - 1), min(prompt_tokens, longest)
    module = load_pack(model, cache=cache)
    if not isinstance(module, NativeDecoder) or not isinstance(module.experts, ResidentExperts):
        raise ConfigError(f"{model} does not run natively in memory here; its kernels cannot be measured alone")
    module.experts.verify()
    threads = torch.get_num_threads()
    peaks = _Peaks(int8_ops_per_s(threads), float_ops_per_s(threads), read_own_bytes_per_s(module, seconds=seconds))
    with torch.inference_mode():
        made = [_experts(module, peaks, tokens, seconds) for tokens in (1, prompt_tokens) if module.config.is_moe]
        made += _products(module, peaks, threads, seconds)
        made += [_attention(module, peaks, tokens, context, seconds) for tokens in (1, prompt_tokens)]
    return made


def _repeat(work: Callable[[], None], seconds: float) -> float:
    """Mean seconds of a call, after one that is not timed."""
    work()
    count, start = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - start < seconds:
        work()
        count += 1
    return (time.perf_counter() - start) / count


def _experts(module: NativeDecoder, peaks: _Peaks, tokens: int, seconds: float) -> KernelSpeed:
    """All MoE layers' experts one after another, each with routing of its own: weights come from memory."""
    kind = expert_layers(Workload.of(module.config, module.pack.formats, 1))[0]
    moes = [layer.ffn for layer in module.config.layers if isinstance(layer.ffn, MoEConfig)]
    draw = torch.Generator().manual_seed(0)
    calls, wanted = [], 0
    for number, moe in enumerate(moes):
        bank = module.experts.bank(number, moe.expert, weight_on_input=moe.router.weight_on == "input")
        scores_TE = torch.rand((tokens, moe.router.num_experts), generator=draw)
        weights_TK, ids_TK = scores_TE.topk(moe.router.top_k)
        routing = Routing(ids_TK, weights_TK, scores_TE, scores_TE)
        x_TD = torch.randn((tokens, module.config.model_dim), generator=draw)
        wanted += int(ids_TK.unique().numel())
        calls.append((bank, x_TD, routing))

    def run() -> None:
        for bank, x_TD, routing in calls:
            bank(x_TD, routing)

    took = _repeat(run, seconds)
    weights = sum(kind.weights.values())
    ops = 2 * weights * tokens * sum(moe.router.top_k for moe in moes)
    is_int8 = not set(kind.weights) <= set(_UNQUANTIZED)
    return peaks.speed("experts", tokens, took, ops, wanted * kind.num_bytes, is_int8=is_int8)


def _products(module: NativeDecoder, peaks: _Peaks, threads: int, seconds: float) -> list[KernelSpeed]:
    """Products of the trunk's formats, weights in the caches."""
    names = sorted({each.format for each in module.pack.layout.trunk if len(each.shape) > 1} & NATIVE_FORMATS.keys())
    made = []
    for name in names:
        for tokens in (1, 64):
            rate = product_ops_per_s(name, tokens, threads, seconds=seconds / 4)
            made.append(peaks.speed(f"product {name}", tokens, 1.0, rate, None, is_int8=name not in _UNQUANTIZED))
    return made


def _attention(module: NativeDecoder, peaks: _Peaks, tokens: int, context: int, seconds: float) -> KernelSpeed:
    """One token behind `context` cached ones, or a prompt."""
    behind = context if tokens == 1 else 0
    cache, took = module.new_cache(), 0.0
    if behind:
        module.hidden(torch.zeros((1, behind), dtype=torch.int64), cache)
    ids_1T = torch.zeros((1, tokens), dtype=torch.int64)
    room = module.config.max_context - behind
    count, start = 0, time.perf_counter()
    while count < 2 or (time.perf_counter() - start < seconds and count < room):
        module.take_timings()
        module.hidden(ids_1T, cache if behind else module.new_cache())
        took += module.take_timings()["attend"]
        count += 1
    seen = behind + count // 2 if behind else (tokens + 1) // 2
    flops = sum(mixer_flops(layer.mixer, seen) for layer in module.config.layers) * tokens
    work = Workload.of(
        module.config, module.pack.formats, max(seen, 1), cache_element_bytes=CACHE_ELEMENT_BYTES[module.cache_format]
    )
    num_bytes = work.cache_read if behind else None
    return peaks.speed("attention", tokens, took / count, flops, num_bytes, is_int8=False)
