"""Hand-over to engines: launch commands for vLLM and SGLang, and the expert placement file where one is read.

Flags are those of vLLM 0.33.0 and SGLang 0.5.23, checked against their argument parsers. SGLang reads a placement
(`--init-expert-location`); vLLM reads none and balances by itself from the number of redundant experts.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from fewfire.config import ModelConfig, MoEConfig, RoutingProfile
from fewfire.plan.hardware import System
from fewfire.plan.placement import place
from fewfire.plan.unique import marginals
from fewfire.plan.workload import Layout

VLLM_VERSION, SGLANG_VERSION = "0.33.0", "0.5.23"
PLACEMENT_FILE = "expert_location.json"
_OWN_FORMATS = ("q4", "q8", "mxfp4", "q4_0", "q4_1", "q8_0", "q4_k", "q6_k")


@dataclass(frozen=True)
class HandOver:
    """Commands by engine, one a node (the first node's first), the placement file's content, and what to know."""

    vllm: tuple[str, ...]
    sglang: tuple[str, ...]
    placement: dict[str, Any] | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Commands and notes; the placement itself is a file of its own."""
        return {
            "vllm": {"version": VLLM_VERSION, "commands": list(self.vllm)},
            "sglang": {"version": SGLANG_VERSION, "commands": list(self.sglang)},
            "placement_file": PLACEMENT_FILE if self.placement is not None else None,
            "notes": list(self.notes),
        }


def placement_map(
    config: ModelConfig, profile: RoutingProfile, devices: int, replicas: int
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """(SGLang's file, layers without counts): for every layer the expert in each slot, devices one after another.

    The file has one row a layer of the model, dense ones too. Rows without counts keep the experts in their order.
    """
    rows, missing = [], []
    slots = profile.num_experts + replicas
    for index, layer in enumerate(config.layers):
        counts = profile.counts.get(index)
        if not isinstance(layer.ffn, MoEConfig) or counts is None:
            rows.append([slot % profile.num_experts for slot in range(slots)])
            if isinstance(layer.ffn, MoEConfig):
                missing.append(index)
            continue
        placed = place(marginals(counts, profile.top_k), devices, replicas=replicas)
        rows.append(placed.physical_to_logical)
    return {"physical_to_logical_map": rows}, tuple(missing)


def default_replicas(num_experts: int, devices: int) -> int:
    """Extra slots: what makes the experts divide, and one more a device from four devices on."""
    return -num_experts % devices + (devices if devices >= 4 else 0)


def hand_over(
    model: str,
    config: ModelConfig,
    system: System,
    layout: Layout,
    *,
    quant: str,
    context: int,
    max_sequences: int,
    profile: RoutingProfile | None = None,
) -> HandOver:
    """Launch commands for `layout` on `system`, with a placement from `profile` where experts are spread whole."""
    notes, placement, replicas = [], None, 0
    spread = layout.data > 1 and config.is_moe
    if spread and profile is not None and layout.expert <= profile.num_experts:
        replicas = default_replicas(profile.num_experts, layout.expert)
        placement, missing = placement_map(config, profile, layout.expert, replicas)
        if missing:
            notes.append(f"{len(missing)} MoE layers have no counts in the profile and keep their experts in order")
        notes.append(f"SGLang reads {PLACEMENT_FILE}; vLLM {VLLM_VERSION} reads no placement and balances by itself")
    if quant in _OWN_FORMATS:
        notes.append(
            f"{quant} is fewfire's or GGUF's format: give these engines an fp8, AWQ or GPTQ checkpoint instead"
        )
    if system.nodes > 1:
        notes.append("FIRST_NODE is the address of the first node; run each line on its node")
    shared = {"context": str(context), "sequences": str(max_sequences)}
    return HandOver(
        _vllm(model, system, layout, quant, spread, replicas, shared),
        _sglang(model, system, layout, quant, spread, replicas, shared, placement is not None),
        placement,
        tuple(notes),
    )


def _join(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _vllm(
    model: str, system: System, layout: Layout, quant: str, spread: bool, replicas: int, shared: dict[str, str]
) -> tuple[str, ...]:
    words = ["vllm", "serve", model, "--max-model-len", shared["context"], "--max-num-seqs", shared["sequences"]]
    for flag, size in (("tensor", layout.tensor), ("data", layout.data), ("pipeline", layout.pipeline)):
        if size > 1:
            words += [f"--{flag}-parallel-size", str(size)]
    if spread:
        words.append("--enable-expert-parallel")
    if quant == "fp8":
        words += ["--quantization", "fp8"]
    if replicas:
        words += ["--enable-eplb", "--eplb-config", f'{{"num_redundant_experts":{replicas}}}']
    if system.nodes == 1:
        return (_join(words),)
    if layout.data > 1:
        words += ["--all2all-backend", "deepep_low_latency", "--data-parallel-address", "FIRST_NODE"]
        local = max(1, system.part.per_node // layout.tensor)
        words += ["--data-parallel-size-local", str(local)]
        rest = [
            [*words, "--headless", "--data-parallel-start-rank", str(local * node)] for node in range(1, system.nodes)
        ]
        return tuple(map(_join, [words, *rest]))
    words += ["--nnodes", str(system.nodes), "--master-addr", "FIRST_NODE"]
    first = [*words, "--node-rank", "0"]
    return tuple(
        map(_join, [first, *([*words, "--node-rank", str(node), "--headless"] for node in range(1, system.nodes))])
    )


def _sglang(
    model: str,
    system: System,
    layout: Layout,
    quant: str,
    spread: bool,
    replicas: int,
    shared: dict[str, str],
    placed: bool,
) -> tuple[str, ...]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--context-length", shared["context"]]
    words += ["--max-running-requests", shared["sequences"], "--tp-size", str(layout.expert)]
    if layout.pipeline > 1:
        words += ["--pp-size", str(layout.pipeline)]
    if spread:
        words += ["--attn-dp-size", str(layout.data), "--ep-size", str(layout.expert)]
    if quant == "fp8":
        words += ["--quantization", "fp8"]
    if spread and system.nodes > 1:
        words += ["--moe-a2a-backend", "deepep"]
    if replicas:
        words += ["--ep-num-redundant-experts", str(replicas)]
    if placed:
        words += ["--init-expert-location", PLACEMENT_FILE]
    if system.nodes == 1:
        return (_join(words),)
    words += ["--nnodes", str(system.nodes), "--dist-init-addr", "FIRST_NODE:5000"]
    return tuple(_join([*words, "--node-rank", str(node)]) for node in range(system.nodes))
