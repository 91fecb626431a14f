"""Measured over predicted: decode and prefill at several shapes and batches, and streamed at several budgets.

`python benchmarks/prediction.py FOLDER [--shapes ...] [--batches 1,4,8] [--limit-gb 2] [--rounds 3] [--json OUT]`
Packs are random, cut to as many layers as stay below the limit, one on the disk at a time. Routing is drawn uniformly,
which is what the planner assumes where it knows none. Every figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import describe

from fewfire.checkpoints.pack import open_pack
from fewfire.config import ModelConfig
from fewfire.families import published
from fewfire.plan.memory import Formats, choose_formats, floor_bytes, weight_bytes
from fewfire.quantize import initialise
from fewfire.quantize.pack import cut_layers

SHAPES = "olmoe-1b-7b,qwen3-30b-a3b,mixtral-8x7b,deepseek-v2-lite,gpt-oss-20b"
STREAMED = "olmoe-1b-7b,qwen3-30b-a3b,mixtral-8x7b"
SHARES = "0.15,0.35,0.6,0.85"
PARTS = {"experts": "q4", "trunk": "q4", "head": "q8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where packs are made, and deleted again")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--streamed", default=STREAMED, help="shapes that are measured with experts on disk too")
    parser.add_argument("--batches", default="1,4,8")
    parser.add_argument("--shares", default=SHARES, help="of the experts in memory, for each budget")
    parser.add_argument("--limit-gb", type=float, default=2.0, help="of a pack")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="every run, as one file")
    options = parser.parse_args()
    print(describe(), flush=True)
    rows = []
    for name in dict.fromkeys([*_words(options.shapes), *_words(options.streamed)]):
        rows += list(measure(name, options))
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1))
    show(rows)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def most_layers(name: str, limit_bytes: float) -> int:
    """The most layers whose pack stays below the limit, at least one MoE layer."""
    config = published.load(name)
    first = next(index for index, layer in enumerate(config.layers) if hasattr(layer.ffn, "router")) + 1
    fits = [n for n in range(first, len(config.layers) + 1) if _bytes(cut_layers(config, n)) <= limit_bytes]
    return max(fits, default=first)


def _formats(config: ModelConfig) -> Formats:
    return choose_formats(config, "q4", **PARTS)


def _bytes(config: ModelConfig) -> int:
    return weight_bytes(config, _formats(config)).total


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    layers, path = most_layers(name, 1e9 * options.limit_gb), options.folder / f"{name}-prediction"
    shutil.rmtree(path, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    initialise(name, path, layers=layers, quant="q4", **PARTS)
    try:
        _bench(path, options)  # not counted: beside a file that was just written, memory is slow for some seconds
        if name in _words(options.shapes):
            for batch in map(int, _words(options.batches)):
                runs = [_bench(path, options, "--batch", str(batch)) for _ in range(options.rounds)]
                yield _row(name, layers, batch, None, runs)
        if name in _words(options.streamed):
            for share in map(float, _words(options.shares)):
                budget = _budget(path, share, options)
                runs = [_bench(path, options, "--memory", str(budget)) for _ in range(options.rounds)]
                yield _row(name, layers, 1, budget, runs)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _budget(path: Path, share: float, options: argparse.Namespace) -> int:
    """The floor, and this share of the experts."""
    pack = open_pack(path)
    context = max(options.prompt_tokens, options.new_tokens + 1)
    floor = floor_bytes(pack.config, pack.formats, context, threads=options.threads)
    return floor.total + int(share * pack.layout.expert_bytes)


def _bench(path: Path, options: argparse.Namespace, *words: str) -> dict[str, Any]:
    """One run in a process of its own."""
    sizes = ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    command = [sys.executable, "-m", "fewfire", "bench", str(path), "--routing", "uniform", "--json"]
    done = subprocess.run([*command, *sizes, *threads, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def _row(name: str, layers: int, batch: int, budget: int | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    def median(*path: str) -> float | None:
        found = [_at(run, path) for run in runs]
        return None if None in found else statistics.median(found)  # type: ignore[type-var]

    made: dict[str, Any] = {"shape": name, "layers": layers, "batch": batch, "budget_bytes": budget, "runs": runs}
    for part in ("decode", "prefill"):
        key = f"{part}_tokens_per_s"
        made[part] = median(key)
        made[f"{part}_predicted"] = median(f"predicted_{key}")
        made[f"{part}_ratio"] = statistics.median(run[key] / run[f"predicted_{key}"] for run in runs)
        made[f"{part}_spread"] = _spread([run[key] / run[f"predicted_{key}"] for run in runs])
        if budget is not None:
            known = [_at(run, ("predicted_at_hit_rate", key)) or run[f"predicted_{key}"] for run in runs]
            ratios = [run[key] / predicted for run, predicted in zip(runs, known, strict=True)]
            made[f"{part}_ratio_at_hit_rate"] = statistics.median(ratios)
            made[f"{part}_hit_rate"] = median("experts", part, "hit_rate")
            made[f"{part}_disk_share"] = median("experts", part, "disk_share")
    made["bandwidth_share"], made["compute_share"] = median("bandwidth_share"), median("compute_share")
    made["drift"] = max(run["drift"] for run in runs)
    print(
        f"{name} x {layers} layers, batch {batch}, budget {budget}: decode {made['decode']:.1f} tok/s, "
        f"{made['decode_ratio']:.2f} of predicted; prefill {made['prefill']:.1f}, {made['prefill_ratio']:.2f}; "
        f"drift up to {100 * made['drift']:.0f} %",
        flush=True,
    )
    return made


def _at(run: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        run = None if run is None else run[key]
    return run


def _spread(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def show(rows: list[dict[str, Any]]) -> None:
    """The tables of docs/bench.md."""
    print("\n| shape, layers | batch | decode tok/s | predicted | ratio | prefill tok/s | predicted | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        if row["budget_bytes"] is None:
            print(
                f"| {row['shape']}, {row['layers']} | {row['batch']} | {row['decode']:.1f} | "
                f"{row['decode_predicted']:.1f} | {row['decode_ratio']:.2f} | {row['prefill']:.1f} | "
                f"{row['prefill_predicted']:.1f} | {row['prefill_ratio']:.2f} |"
            )
    print("\n| shape, layers | budget GB | decode tok/s | hit rate | ratio | prefill tok/s | hit rate | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        if row["budget_bytes"] is not None:
            print(
                f"| {row['shape']}, {row['layers']} | {row['budget_bytes'] / 1e9:.2f} | {row['decode']:.1f} | "
                f"{row['decode_hit_rate']:.2f} | {row['decode_ratio_at_hit_rate']:.2f} | {row['prefill']:.1f} | "
                f"{row['prefill_hit_rate']:.2f} | {row['prefill_ratio_at_hit_rate']:.2f} |"
            )


if __name__ == "__main__":
    main()
