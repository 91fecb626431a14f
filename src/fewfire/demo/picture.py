"""The demo's picture: losses of the three runs, and load per expert and layer with and without balancing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from fewfire.checkpoints.atomic import write_bytes

COLOURS = {"moe": "#c2410c", "dense": "#1d4ed8", "unbalanced": "#737373"}
NAMES = {"moe": "MoE, 16 experts, top-2", "dense": "dense twin, equal active FLOPs", "unbalanced": "MoE, no balancing"}


def read_curve(folder: Path, kind: str, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chosen = [row for row in rows if row["kind"] == kind]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def draw(folder: Path, target: Path, loads: dict[str, list[list[int]]], yardsticks: dict[str, float]) -> None:
    """Write `target` (PNG). `folder` holds the runs moe, dense, unbalanced; `loads`: run -> layer -> expert counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 6.2), dpi=120, layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = panels
    _draw_losses(left, folder, yardsticks)
    _draw_loads(right, loads)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    pyplot.close(figure)
    write_bytes(target, stream.getvalue())


def _draw_losses(figure: Any, folder: Path, yardsticks: dict[str, float]) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True)
    for run, colour in COLOURS.items():
        steps, losses = read_curve(folder / run, "train", "loss")
        top.plot(steps, losses, color=colour, label=NAMES[run], linewidth=1.6)
        steps, bits = read_curve(folder / run, "eval", "bits_per_byte")
        bottom.plot(steps, bits, "o-", color=colour, markersize=4, linewidth=1.6)
        bottom.annotate(f"{bits[-1]:.2f}", (steps[-1], bits[-1]), textcoords="offset points", xytext=(4, 5),
                        color=colour, fontsize=9)  # fmt: skip
    for name, value in yardsticks.items():
        bottom.axhline(value, color="#404040", linewidth=0.9, linestyle="--")
        bottom.annotate(f"{name} {value:.2f}", (1.0, value), xycoords=("axes fraction", "data"), ha="right",
                        va="bottom", fontsize=8, color="#404040")  # fmt: skip
    top.set(ylabel="training loss, nats per token", title="Loss at equal tokens")
    top.legend(frameon=False, fontsize=9)
    bottom.set(ylabel="held-out bits per byte", xlabel="step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_loads(figure: Any, loads: dict[str, list[list[int]]]) -> None:
    shares = {
        run: [[count * len(row) / max(1, sum(row)) for count in row] for row in rows] for run, rows in loads.items()
    }
    axes_list = figure.subplots(len(shares), 1, squeeze=False)[:, 0]
    image = None
    for axes, (run, rows) in zip(axes_list, shares.items()):
        image = axes.imshow(rows, aspect="auto", cmap="magma", vmin=0, vmax=4, interpolation="nearest")
        peak = max(max(row) for row in rows)
        axes.set(title=f"{NAMES[run]}: busiest expert {peak:.1f}x its fair share", ylabel="MoE layer")
        axes.title.set_fontsize(10)
        axes.set_yticks(range(len(rows)), [str(number + 1) for number in range(len(rows))])
        axes.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 16)))
    axes_list[-1].set_xlabel("expert")
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes_list), shrink=0.8, extend="max")
        bar.set_label("load / fair share, held-out text")
