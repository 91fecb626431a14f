"""Hit rates of the cache policies beside Belady's: on traces as skewed as given counts, and on uniform ones.

    python benchmarks/cache_policies.py COUNTS.json [--model olmoe-1b-7b] [--domain github] [--reuse 0.25] [--json]

COUNTS.json: how often each expert fired, by model, domain and layer. `informed`: a policy that knows each expert's true
chance to come next, the most that can be known without the future; what lies between it and Belady is luck.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewfire.trace import POLICIES, Trace, decode_steps, draw_trace, simulate, stretch_counts

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
BAR = 0.08


def informed_rate(trace: Trace, slots: int, reuse: float) -> float:
    """Hit rate where what leaves is what comes next least probably, over how long its slot waits for that: each expert
    by its own share of tokens, or, with `reuse`, because its layer's last token had it."""
    first_ids, num_layers = np.cumsum([0, *trace.num_experts]), len(trace.num_experts)
    layers = np.repeat(np.arange(num_layers), trace.num_experts)
    shares = np.concatenate([counts.numpy() for counts in trace.counts()]) / trace.num_tokens
    chances, held, hits, wanted = (1 - reuse) * shares, np.zeros(trace.num_records, bool), 0, 0
    for layer, *experts in ((step.layer, *step.experts) for step in decode_steps(trace)):
        ids, here = first_ids[layer] + np.array(experts), slice(first_ids[layer], first_ids[layer + 1])
        chances[here] = (1 - reuse) * shares[here]
        chances[ids] += reuse
        missing = ids[~held[ids]]
        hits, wanted = hits + len(ids) - len(missing), wanted + len(ids)
        for id in missing:
            if held.sum() >= slots:
                waits = 1 + ((layers - layer - 1) % num_layers + 1) / num_layers  # as lfru counts it
                may_leave = np.where(held, chances / waits, np.inf)
                may_leave[ids] = np.inf
                held[may_leave.argmin()] = False
            held[id] = True
    return hits / wanted


def neighbours(trace: Trace) -> float:
    """Share of a token's experts that the next token has too."""
    same = (trace.ids_TLK[1:, :, :, None] == trace.ids_TLK[:-1, :, None, :]).any(dim=-1)
    return float(same.float().mean())


def rows_of(trace: Trace, reuse: float) -> list[dict[str, Any]]:
    steps, rows = decode_steps(trace), []
    for share in SHARES:
        slots = round(share * trace.num_records)
        row: dict[str, Any] = {"share": share, "slots": slots, "informed": informed_rate(trace, slots, reuse)}
        rows.append(row | {policy: simulate(trace.num_experts, steps, slots, policy).hit_rate for policy in POLICIES})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Hit rates of the cache policies beside Belady's.")
    parser.add_argument("counts", type=Path)
    parser.add_argument("--model", default="olmoe-1b-7b")
    parser.add_argument("--domain", default="github")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, help="of a layer (default: as many as counted)")
    parser.add_argument("--top-k", type=int, help="(default: the counted model's)")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--reuse", type=float, default=0.25)
    parser.add_argument(
        "--informed", type=int, default=300, help="tokens of the informed column, which is slow; 0: none"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    entry = json.loads(options.counts.read_text())["models"][options.model]
    num_experts, top_k = options.experts or entry["num_experts"], options.top_k or entry["top_k"]
    skewed = stretch_counts(entry["domains"][options.domain], options.layers, num_experts)
    uniform = [[1.0] * num_experts] * options.layers
    torch.set_num_threads(1)
    made = {}
    for name, counts, reuse in (
        ("skewed, with reuse", skewed, options.reuse),
        ("skewed", skewed, 0.0),
        ("uniform, with reuse", uniform, options.reuse),
        ("uniform", uniform, 0.0),
    ):
        trace = draw_trace(counts, top_k, options.tokens, reuse=reuse)
        made[name] = {"neighbours_share": neighbours(trace), "rows": rows_of(trace, reuse)}
        if not options.json:
            print_table(name, made[name])
    if options.json:
        print(json.dumps({"options": {**vars(options), "counts": options.counts.name}, "traces": made}, indent=2))


def print_table(name: str, made: dict[str, Any]) -> None:
    columns = ["lru", "s3fifo", "lfru", "informed", "belady"]
    print(f"\n{name}; {100 * made['neighbours_share']:.0f} % of a token's experts come again with the next one")
    print("in memory  " + "".join(f"{column:>10}" for column in columns) + "   lfru below belady")
    for row in made["rows"]:
        cells = "".join(f"{100 * row[each]:10.1f}" for each in columns)
        gap = row["belady"] - row["lfru"]
        print(f"{100 * row['share']:8.1f} %  {cells}{100 * gap:10.1f} points{'' if gap <= BAR else ' (over 8)'}")


if __name__ == "__main__":
    main()
