"""Small charts as inline SVG: lines on linear or logarithmic axes, stacked bars, labelled points. No scripts, no files.

A chart prints well, opens offline, and says its values on hover through titles. Colours keep their contrast in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 680, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 34, 20, 56
COLOURS = ("#1b4f8f", "#d9822b", "#2e7d4f", "#8a2f5b", "#5b6770", "#b59f00")


@dataclass(frozen=True)
class Line:
    """A named series of (x, y); `dashed` for what is only a reference."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class _Axis:
    """Maps values to pixels and finds round ticks, linear from zero or logarithmic."""

    def __init__(self, values: Sequence[float], start: float, end: float, logarithmic: bool):
        self.start, self.end, self.logarithmic = start, end, logarithmic
        low, high = min(values), max(values)
        if logarithmic:
            self.low, self.high = float(floor(log10(low))), float(ceil(log10(high)))
            if self.high == self.low:
                self.high += 1.0
        else:
            step = _round_step(high)
            self.low, self.high = 0.0, step * max(1, ceil(high / step - 1e-9))

    def at(self, value: float) -> float:
        position = log10(value) if self.logarithmic else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            every = max(1, round((self.high - self.low) / 8))
            return [10.0**power for power in range(int(self.low), int(self.high) + 1, every)]
        step = _round_step(self.high)
        return [index * step for index in range(round(self.high / step) + 1)]


def _round_step(high: float) -> float:
    """1, 2 or 5 times a power of ten: four to eight of them reach `high`."""
    if high <= 0:
        return 1.0
    power = 10.0 ** floor(log10(high / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if high / (power * factor) <= 7)


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str, x_text: Callable, y_text: Callable) -> list[str]:
    parts = []
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(x_text(tick))}</text>'
        )
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(y_text(tick))}</text>')
    middle, centre = (TOP + HEIGHT - BOTTOM) / 2, (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return parts


def _wrap(parts: Sequence[str], title: str, height: int = HEIGHT) -> str:
    body, label = "".join(parts), escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}"><title>{label}</title>{body}</svg>'


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_text: Callable[[float], str] = lambda value: f"{value:g}",
    y_text: Callable[[float], str] = lambda value: f"{value:g}",
    marks: Sequence[tuple[float, float, str]] = (),
) -> str:
    """Lines over common axes with a legend; `marks` are labelled points (x, y, words)."""
    points = [point for line in lines for point in line.points] + [(x, y) for x, y, _ in marks]
    x = _Axis([point[0] for point in points], LEFT, WIDTH - RIGHT, log_x)
    y = _Axis([point[1] for point in points], HEIGHT - BOTTOM, TOP, log_y)
    parts = _frame(x, y, x_label, y_label, x_text, y_text)
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in line.points)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>')
        for px, py in line.points if len(line.points) <= 24 else ():
            words = escape(f"{line.name}: {x_text(px)}, {y_text(py)}")
            parts.append(
                f'<circle cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3" fill="{colour}"><title>{words}</title></circle>'
            )
    parts += [_mark(x.at(px), y.at(py), words) for px, py, words in marks]
    return _wrap(parts, title) + legend([line.name for line in lines])


def _mark(x: float, y: float, words: str, *, radius: int = 6) -> str:
    """A ring with words beside it, on the side with room."""
    anchor, shift = ("end", -9) if x > WIDTH * 0.6 else ("start", 9)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="none" stroke="#111" stroke-width="1.6"/>'
        f'<text class="mark" x="{x + shift:.1f}" y="{y - 8:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def legend(names: Sequence[str]) -> str:
    """Coloured names under a chart."""
    items = "".join(
        f'<span><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'


def stacked_bars(
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    *,
    title: str,
    text: Callable[[float], str],
    limits: Sequence[tuple[float, str]] = (),
) -> str:
    """One horizontal bar a row, its parts stacked in the order of `names`; `limits` are marked lines (value, words)."""
    totals = [sum(values) for _, values in rows]
    axis = _Axis([max([*totals, *(value for value, _ in limits)])], 170, WIDTH - RIGHT, False)
    height = 40 + 44 * len(rows) + (24 if limits else 0)
    parts = []
    for tick in axis.ticks():
        at = axis.at(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="8" x2="{at:.1f}" y2="{height - 30}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 12}" text-anchor="middle">{escape(text(tick))}</text>')
    for index, (label, values) in enumerate(rows):
        top, start = 14 + 44 * index, 0.0
        parts.append(f'<text x="160" y="{top + 19}" text-anchor="end">{escape(label)}</text>')
        for place, value in enumerate(values):
            left, right = axis.at(start), axis.at(start + value)
            words = escape(f"{names[place]}: {text(value)}")
            colour = COLOURS[place % len(COLOURS)]
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{max(0.0, right - left):.1f}" height="28" fill="{colour}">'
                f"<title>{words}</title></rect>"
            )
            start += value
    for value, words in limits:
        at = axis.at(value)
        ends = f'x1="{at:.1f}" y1="6" x2="{at:.1f}" y2="{height - 32}"'
        parts.append(f'<line {ends} stroke="#111" stroke-dasharray="4 3"/>')
        parts.append(f'<text class="mark" x="{at - 6:.1f}" y="{height - 36}" text-anchor="end">{escape(words)}</text>')
    return _wrap(parts, title, height) + legend(names)


def scatter(
    groups: Sequence[tuple[str, Sequence[tuple[float, float, str]]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    highlight: str = "",
) -> str:
    """Groups of points (x, y, words) on logarithmic axes; the point called `highlight` is ringed and named."""
    points = [point for _, group in groups for point in group]
    x = _Axis([point[0] for point in points], LEFT, WIDTH - RIGHT, True)
    y = _Axis([point[1] for point in points], HEIGHT - BOTTOM, TOP, True)
    parts = _frame(x, y, x_label, y_label, x_text, y_text)
    for index, (_, group) in enumerate(groups):
        colour = COLOURS[index % len(COLOURS)]
        for px, py, words in group:
            hover = escape(f"{words}: {x_text(px)}, {y_text(py)}")
            parts.append(
                f'<circle cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="4.5" fill="{colour}" fill-opacity="0.8">'
                f"<title>{hover}</title></circle>"
            )
            if words == highlight:
                parts.append(_mark(x.at(px), y.at(py), words, radius=9))
    return _wrap(parts, title) + legend([name for name, _ in groups])
