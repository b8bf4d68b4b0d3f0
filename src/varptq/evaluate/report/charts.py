"""Curves, point clouds and heat maps as inline SVG.

Pictures are 360 units wide, about the width of a phone: a column of a wide page or a whole narrow
page shows them at nearly their real size, so text stays readable. Colours are CSS variables of the
page, for light and dark. Scales of axes are chosen here; what is drawn is up to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from varptq.evaluate.report.markup import Markup, element, join

WIDTH, HEIGHT = 360.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 8.0, 36.0
GOAL_TICKS = 4
# A smaller value counts as 0, which keeps the logarithm of the step between ticks finite.
SMALLEST = 1e-300
CELL_HEIGHT = 22.0
# Keeps the number in a full cell readable.
FULL_CELL = 0.72

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Values at the positions 0, 1, ... of a chart. `tone` is a class of the page's style:
    "float", "quantized" or "second"."""

    name: str
    values: Sequence[float]
    tone: str


@dataclass(frozen=True)
class Axis:
    """Maps values to heights: linear from 0 to the top tick, or logarithmic over whole decades."""

    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def linear(cls, top: float) -> Axis:
        """From 0 to at least `top`, in steps of 1, 2 or 5 times a power of ten."""
        if not top > SMALLEST:
            return cls((0.0, 1.0))
        raw = top / GOAL_TICKS
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
        return cls(tuple(step * i for i in range(math.ceil(top / step - 1e-9) + 1)))

    @classmethod
    def decades(cls, low: float, high: float) -> Axis:
        """Powers of ten around two positive numbers."""
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return cls(tuple(10.0**power for power in range(first, max(last, first + 1) + 1)), log=True)

    def height(self, value: float) -> float:
        """Position from the top of the picture."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.log:
            value, low, high = (math.log10(max(v, low)) for v in (value, low, high))
        share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curves(
    series: Sequence[Series], names: Sequence[str], axis: Axis, form: Format, below: str
) -> Markup:
    """Lines with a marker at every value; `names` label the positions, `below` says what they
    are."""
    step = (WIDTH - LEFT - RIGHT) / len(names)
    centers = [LEFT + step * (i + 0.5) for i in range(len(names))]
    parts = [
        element("text", name, x=center, y=HEIGHT - BOTTOM + 14, text_anchor="middle")
        for name, center in zip(names, centers, strict=True)
    ]
    for line in series:
        points = [(x, axis.height(value)) for x, value in zip(centers, line.values, strict=True)]
        parts.append(element("path", d=_path(points), class_=f"line {line.tone}"))
        for (x, y), value, name in zip(points, line.values, names, strict=True):
            hint = element("title", f"{line.name}, {name}: {form(value)}")
            parts.append(element("circle", hint, cx=x, cy=y, r=3, class_=f"dot {line.tone}"))
    return _chart(join(*parts), axis, form, below, ", ".join(line.name for line in series))


def cloud(points: Series, line: Series, axis: Axis, form: Format, below: str) -> Markup:
    """Many points around a line, e.g. frequencies of all codebook entries."""
    step = (WIDTH - LEFT - RIGHT) / len(line.values)
    at = [LEFT + step * (i + 0.5) for i in range(len(line.values))]
    dots = "".join(
        f"M{x:.1f} {axis.height(value):.1f}h0" for x, value in zip(at, points.values, strict=True)
    )
    path = _path([(x, axis.height(value)) for x, value in zip(at, line.values, strict=True)])
    drawn = join(
        element("path", d=dots, class_=f"points {points.tone}"),
        element("path", d=path, class_=f"line {line.tone}"),
    )
    return _chart(drawn, axis, form, below, f"{points.name}, {line.name}")


def heat_map(
    rows: Sequence[Sequence[float]],
    shares: Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    hints: Sequence[Sequence[str]],
    below: str,
) -> Markup:
    """A number in every cell, shaded by its share in 0..1. `hints` show under the pointer."""
    width = (WIDTH - LEFT - RIGHT) / len(column_names)
    bottom = TOP + CELL_HEIGHT * len(rows)
    parts: list[Markup] = []
    for i, (name, values) in enumerate(zip(row_names, rows, strict=True)):
        top = TOP + CELL_HEIGHT * i
        middle = top + CELL_HEIGHT / 2 + 4
        parts.append(element("text", name, x=LEFT - 6, y=middle, text_anchor="end"))
        for j, value in enumerate(values):
            left = LEFT + width * j
            hint = element("title", hints[i][j])
            cell = element(
                "rect",
                hint,
                x=left + 0.5,
                y=top + 0.5,
                width=width - 1,
                height=CELL_HEIGHT - 1,
                fill_opacity=shares[i][j] * FULL_CELL,
                class_="cell",
            )
            number = element("text", _short(value), x=left + width / 2, y=middle, class_="in-cell")
            parts += [cell, number]
    for j, name in enumerate(column_names):
        x = LEFT + width * (j + 0.5)
        parts.append(element("text", name, x=x, y=bottom + 14, text_anchor="middle"))
    parts.append(_below(below, bottom + 30))
    return _svg(join(*parts), bottom + BOTTOM, below)


def _chart(drawn: Markup, axis: Axis, form: Format, below: str, says: str) -> Markup:
    grid: list[Markup] = []
    for tick in axis.ticks:
        y = axis.height(tick)
        grid.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        grid.append(element("text", form(tick), x=LEFT - 6, y=y + 4, text_anchor="end"))
    return _svg(join(*grid, drawn, _below(below, HEIGHT - 6)), HEIGHT, says)


def _below(label: str, y: float) -> Markup:
    x = (LEFT + WIDTH - RIGHT) / 2
    return element("text", label, x=x, y=y, text_anchor="middle", class_="axis")


def _svg(content: Markup, height: float, says: str) -> Markup:
    box = f"0 0 {WIDTH:g} {height:g}"
    return element("svg", content, viewBox=box, role="img", aria_label=says)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _short(value: float) -> str:
    """At most three characters before the point, one decimal for small numbers."""
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
