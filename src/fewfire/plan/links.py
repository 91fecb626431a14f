"""What devices say to one another in a step: all-reduce, all-to-all, pipeline hops. Seconds, from bytes and links.

One-direction rates, decimal. A collective is its payload over the slowest link it crosses, plus one latency.
"""

from __future__ import annotations

from math import ceil

from fewfire.plan.hardware import System
from fewfire.plan.workload import Assumptions, Layout, Workload

_HOST_LINK = 8e9  # bytes/s where a part states no link: through the host


def _fast(system: System, assume: Assumptions) -> float:
    link = system.part.link_gbs
    return (link * 1e9 if link else _HOST_LINK) * assume.link_efficiency


def _slow(system: System, assume: Assumptions) -> float:
    link = system.part.node_link_gbs
    return (link * 1e9 if link else 12.5e9) * assume.link_efficiency


def _latency(system: System, crosses: bool, assume: Assumptions) -> float:
    if not crosses:
        return assume.node_latency_s
    return assume.network_latency_s if (system.part.node_link_gbs or 0) >= 50 else assume.ethernet_latency_s


def all_reduce_seconds(system: System, span: int, payload_bytes: float, assume: Assumptions) -> float:
    """A ring all-reduce of `payload_bytes` over `span` devices: 2 (n - 1) / n of it passes each device's link."""
    crosses = span > system.part.per_node
    rate = _slow(system, assume) if crosses else _fast(system, assume)
    return payload_bytes * 2 * (span - 1) / span / rate + _latency(system, crosses, assume)


def all_to_all_seconds(
    work: Workload, system: System, layout: Layout, tokens: float, assume: Assumptions, *, prefill: bool = False
) -> float:
    """Dispatch (8-bit activations) and combine (bf16) of one MoE layer, `tokens` tokens a device.

    Decode uses low-latency exchanges: one copy a chosen expert on another device. Prefill sends one copy to each
    other node that holds a chosen expert (group-limited routers bound those nodes) and spreads it there by the
    faster link. Source: DeepSeek-V3 report, section 3.2.
    """
    moe = next((moe for stack, _, moe in work.config.moe_layers if stack == "decoder"), None)
    if moe is None or layout.expert == 1:
        return 0.0
    payload = 3.0 * work.config.model_dim * tokens
    nodes = ceil(layout.expert / system.part.per_node)
    top_k = moe.router.top_k
    inside_share = min(1.0, system.part.per_node / layout.expert)
    if nodes == 1:
        copies = top_k * (1 - 1 / layout.expert)
        return payload * copies / _fast(system, assume) + 2 * _latency(system, False, assume)
    remote = top_k * (1 - inside_share)
    if prefill:
        reached = nodes * (1 - (1 - 1 / nodes) ** top_k)
        if moe.router.groups is not None:
            reached = min(reached, moe.router.groups.top_groups)
        remote = reached * (nodes - 1) / nodes
    inside = top_k if prefill else top_k * inside_share
    slow = payload * remote / _slow(system, assume)
    return max(slow, payload * inside / _fast(system, assume)) + 2 * _latency(system, True, assume)


def step_seconds(
    work: Workload, system: System, layout: Layout, tokens: float, assume: Assumptions, *, prefill: bool = False
) -> float:
    """All collectives of one step for `tokens` tokens a data-parallel group.

    Tensor parallel: two all-reduces a layer (one where the experts are exchanged instead). Expert parallel: one
    all-to-all pair a MoE layer, less what is overlapped. Pipeline: one hop a stage.
    """
    seconds, model_dim = 0.0, work.config.model_dim
    if layout.tensor > 1:
        reduces = work.num_layers * 2 - (work.num_moe_layers if layout.data > 1 else 0)
        seconds += reduces * all_reduce_seconds(system, layout.tensor, tokens * model_dim * 2, assume)
    if layout.data > 1:
        exchange = all_to_all_seconds(work, system, layout, tokens / layout.tensor, assume, prefill=prefill)
        seconds += exchange * work.num_moe_layers * (1 - assume.overlap)
    if layout.pipeline > 1:
        crosses = system.nodes > 1
        rate = _slow(system, assume) if crosses else _fast(system, assume)
        hop = tokens * model_dim * 2 / rate + _latency(system, crosses, assume)
        seconds += hop * layout.pipeline
    return seconds
