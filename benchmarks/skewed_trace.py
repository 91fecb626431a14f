"""Writes a trace that fits a pack, as skewed as given counts, with experts of the last token used again.

python benchmarks/skewed_trace.py COUNTS.json PACK OUT.safetensors [--domain github] [--reuse 0.25] [--tokens 512]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewfire.checkpoints.pack import open_pack
from fewfire.trace import draw_trace, stretch_counts, write_trace


def main() -> None:
    parser = argparse.ArgumentParser(description="A skewed trace that fits a pack.")
    parser.add_argument("counts", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--domain", default="github", help="uniform: no skew")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--reuse", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    routers = [moe.router for _, _, moe in open_pack(options.pack).config.moe_layers]
    rows = [[1.0]]
    if options.domain != "uniform":
        rows = json.loads(options.counts.read_text())["models"][options.model]["domains"][options.domain]
    counts = stretch_counts(rows, len(routers), routers[0].num_experts, seed=options.seed)
    trace = draw_trace(counts, routers[0].top_k, options.tokens, reuse=options.reuse, seed=options.seed)
    write_trace(options.out, trace)
    print(f"{options.out}: {trace.num_tokens} tokens, {len(routers)} layers of {routers[0].num_experts} experts")


if __name__ == "__main__":
    main()
