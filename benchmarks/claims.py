"""`make claims`: writes docs/CLAIMS.md, each claim with the command that tests it, the figure, the verdict.

Figures come from the planner and from the demo (trained if it is not kept yet). What was only quoted is marked so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from machine import describe

import fewfire
from fewfire.cli.progress import TrainProgress
from fewfire.demo import DemoResult, run_demo
from fewfire.families import published
from fewfire.sizes import format_count

TARGET = Path(__file__).parents[1] / "docs" / "CLAIMS.md"


class Claim(NamedTuple):
    """One row. `kind`: computed (from published shapes), measured (here, now) or quoted."""

    claim: str
    command: str
    figure: str
    kind: str
    verdict: str


def planned_claims() -> Iterator[Claim]:
    """What arithmetic over published shapes decides."""
    mixtral = fewfire.plan("mixtral-8x7b", quant="fp16")
    total, active = mixtral.counts.total, mixtral.counts.active
    yield Claim(
        "Mixtral 8x7B is eight 7B models: 56B parameters",
        "fewfire plan mixtral-8x7b",
        f"{total:,} parameters in all ({total / 1e9:.1f}B), {active / 1e9:.1f}B active",
        "computed",
        "false: attention and embeddings are shared" if total != 56e9 else "true",
    )
    weights = mixtral.weights.total
    yield Claim(
        "Mixtral 8x7B needs 93 GB in fp16, though a token uses 12.9B parameters",
        "fewfire plan mixtral-8x7b --quant fp16",
        f"{weights / 1e9:.1f} GB = {weights / 2**30:.1f} GiB of weights",
        "computed",
        "true: total decides memory" if round(weights / 1e9) == 93 else "false",
    )
    large, small = fewfire.plan("400b"), fewfire.plan("30b")
    ratio = large.flops.total / small.flops.total
    yield Claim(
        "A 400B dense model costs about thirteen times a 30B one per token",
        "fewfire plan 400b --versus 30b",
        f"{ratio:.1f} times the FLOPs, {large.bytes_read / small.bytes_read:.1f} times the bytes read",
        "computed",
        "true" if 11 < ratio < 15 else "false",
    )
    sparse = fewfire.plan("400b-a30b")
    yield Claim(
        "A 400B MoE with 30B active costs like the 30B one, but must be housed like the 400B one",
        "fewfire plan 400b-a30b --versus 30b",
        f"{sparse.flops.total / small.flops.total:.2f} times the FLOPs, "
        f"{sparse.weights.total / small.weights.total:.1f} times the memory",
        "computed",
        "true" if sparse.flops.total < 1.2 * small.flops.total else "false",
    )
    shares = {name: _router_share(name) for name in ("mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "olmoe-1b-7b")}
    yield Claim(
        "The router costs next to nothing",
        "fewfire plan NAME",
        "share of a token's FLOPs: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()),
        "computed",
        "true: under 1 % each" if max(shares.values()) < 0.01 else f"up to {max(shares.values()):.1%}",
    )


def _router_share(name: str) -> float:
    flops = fewfire.plan(name).flops
    return flops.router / flops.total


def demo_claims(result: DemoResult) -> Iterator[Claim]:
    """What the demo's three training runs decide."""
    moe, dense, unbalanced, end = result.rows
    gap = dense.bits_per_byte - moe.bits_per_byte
    yield Claim(
        "At equal active FLOPs and equal tokens a MoE learns more than a dense model",
        "fewfire demo",
        f"held-out bits per byte after {format_count(moe.tokens)} tokens: MoE {moe.bits_per_byte:.3f}, dense "
        f"{dense.bits_per_byte:.3f} ({moe.total / dense.total:.1f} times the memory)",
        "measured",
        f"{'true' if gap > 0 else 'false'} here: {abs(gap):.3f} {'better' if gap > 0 else 'worse'}; "
        "one seed, minutes of training",
    )
    with_balance, without = _busiest(moe.load), _busiest(unbalanced.load)
    yield Claim(
        "Without balancing the load collapses onto a few experts",
        "fewfire demo",
        f"busiest expert {without:.1f} times its fair share and {unbalanced.num_dead} dead without, "
        f"{with_balance:.1f} times and {moe.num_dead} dead with the loss, at equal tokens",
        "measured",
        "true" if without > 1.5 * with_balance else "not visible in a run this short",
    )
    yield Claim(
        "A MoE is faster because it has fewer parameters",
        "fewfire demo",
        f"{format_count(moe.total)} parameters against {format_count(dense.total)} of its dense twin with the same "
        f"active FLOPs, at {moe.tokens_per_s / dense.tokens_per_s:.2f} of the twin's training speed",
        "measured",
        "false: it has more parameters and uses few of them; speed follows the active ones",
    )


def memory_claims(result: DemoResult) -> Iterator[Claim]:
    """What running from disk decides."""
    disk = result.disk
    if disk is not None:
        yield Claim(
            "An MoE that does not fit in memory cannot be run",
            "fewfire demo",
            f"half of its experts on disk: {disk.num_tokens} tokens, "
            f"{'the same bit for bit' if disk.same_tokens else 'not the same'}, at {disk.disk_tokens_per_s:,.0f} "
            f"tokens/s ({disk.disk_predicted or 0:,.0f} predicted) against {disk.resident_tokens_per_s:,.0f} in memory",
            "measured",
            "false: it costs speed, not a value" if disk.same_tokens else "true",
        )
    laptop = fewfire.plan("mixtral-8x7b", quant="q4", hardware="Laptop 16GB", memory="14GiB").to_json()
    stream, weights = laptop["hardware"][0]["streaming"], laptop["memory"]["weights_bytes"]
    speed, disk_speed = stream["decode_tokens_per_s"], stream["tiers"][-1]["bytes_per_s"]
    yield Claim(
        "Mixtral 8x7B runs on a 16 GB laptop",
        "fewfire plan mixtral-8x7b --quant q4 --memory 14GiB --hardware 'Laptop 16GB'",
        f"{weights / 1e9:.1f} GB in q4: {100 * stream['hit_rate']:.0f} % of expert reads answered from 14 GiB of "
        f"memory, the rest by an SSD of {disk_speed / 1e9:.0f} GB/s: {speed:.1f} tokens/s",
        "computed",
        f"true, slowly: {1 / speed:.1f} s a token, for work that can wait, not for a conversation",
    )


def _busiest(load: list[list[int]]) -> float:
    return max(max(layer) * len(layer) / max(1, sum(layer)) for layer in load)


def count_rows() -> Iterator[str]:
    """The published models: their makers' words beside the counted figures."""
    for name in published.names():
        entry = published.find(name)
        counts = fewfire.plan(name).counts
        yield (
            f"| `{name}` | {entry.total or '-'} / {entry.active or '-'} | {counts.total:,} | {counts.active:,} | "
            f"{counts.active_excluding_embedding:,} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="length of the demo that is trained or kept")
    arguments = parser.parse_args()
    result, _ = run_demo(lambda title: TrainProgress(title), minutes=arguments.minutes)
    lines = [
        "# Claims people make about MoE, tested",
        "",
        "Written by `make claims`; do not edit. *Computed*: arithmetic over published shapes. *Measured*: by the",
        f"command, on this machine. *Quoted*: somebody else's figure, not checked here. {describe()}.",
        "",
        "| claim | command | figure | kind | verdict |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.claim} | `{c.command}` | {c.figure} | {c.kind} | {c.verdict} |"
        for c in (*planned_claims(), *demo_claims(result), *memory_claims(result))
    ]
    lines += [
        "",
        "## Total and active, counted",
        "",
        "Publisher's figures are quoted; the counts are computed and exact to the integer (`fewfire plan NAME`).",
        "",
        "| model | quoted total / active | total | active, input embedding included | excluded |",
        "|---|---|--:|--:|--:|",
        *count_rows(),
    ]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
