"""Charts as Pillow images: bars, heat maps and curves, and putting several on one page.

Light background, sorted by the caller, text in Pillow's built-in font; everything is drawn at twice
its nominal size so that it stays sharp on dense screens. Values are positive or None. What is
drawn is decided in figures.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Point = tuple[float, float]

DENSITY = 2
WHITE, INK, MUTED, GRID = (255, 255, 255), (30, 34, 40), (105, 112, 120), (225, 228, 232)
EMPTY = (243, 244, 246)
PALETTE = (
    (31, 99, 168),
    (214, 106, 28),
    (46, 139, 87),
    (178, 58, 90),
    (118, 92, 170),
    (90, 90, 90),
)
# Light to dark, for positive values; text on the dark half is white.
RAMP = ((247, 250, 253), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
TITLE, TEXT, SMALL = 16, 12, 10
PAD, LINE = 16, 18


class Canvas:
    """A white picture of nominal size; coordinates are nominal too."""

    def __init__(self, width: float, height: float) -> None:
        size = (math.ceil(width) * DENSITY, math.ceil(height) * DENSITY)
        self.image = Image.new("RGB", size, WHITE)
        self._pen = ImageDraw.Draw(self.image)

    def text(
        self, at: Point, text: str, size: int = TEXT, color: Color = INK, anchor: str = "lm"
    ) -> None:
        x, y = at
        font = ImageFont.load_default(size * DENSITY)
        self._pen.text((x * DENSITY, y * DENSITY), text, color, font, anchor=anchor)

    def box(self, corner: Point, size: Point, color: Color) -> None:
        (x, y), (width, height) = corner, size
        right, bottom = (x + width) * DENSITY - 1, (y + height) * DENSITY - 1
        if right >= x * DENSITY and bottom >= y * DENSITY:
            self._pen.rectangle((x * DENSITY, y * DENSITY, right, bottom), color)

    def line(self, points: Sequence[Point], color: Color, width: float = 2) -> None:
        scaled = [(x * DENSITY, y * DENSITY) for x, y in points]
        self._pen.line(scaled, color, round(width * DENSITY), joint="curve")

    def dot(self, at: Point, color: Color, radius: float = 3.5) -> None:
        x, y, r = at[0] * DENSITY, at[1] * DENSITY, radius * DENSITY
        self._pen.ellipse((x - r, y - r, x + r, y + r), color)


def text_width(text: str, size: int = TEXT) -> float:
    """Nominal width of a line of text."""
    return ImageFont.load_default(size * DENSITY).getlength(text) / DENSITY


def number(value: float) -> str:
    """Two significant digits, short: 0.0013 -> ".0013", 12.3 -> "12", 0.00004 -> "4e-05"."""
    if value == 0:
        return "0"
    if value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:.{digits}f}".removeprefix("0") if value < 1 else f"{value:.{digits}f}"


def stacked(pictures: Sequence[Image.Image], *, across: int = 1) -> Image.Image:
    """Pictures on one page, in lines of `across`, aligned at the top left."""
    lines = [pictures[start : start + across] for start in range(0, len(pictures), across)]
    page = Image.new(
        "RGB",
        (
            max(sum(picture.width for picture in line) for line in lines),
            sum(max(picture.height for picture in line) for line in lines),
        ),
        WHITE,
    )
    y = 0
    for line in lines:
        x = 0
        for picture in line:
            page.paste(picture, (x, y))
            x += picture.width
        y += max(picture.height for picture in line)
    return page


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; `series` chooses the colour."""

    label: str
    value: float
    series: int = 0


def bars(title: str, rows: Sequence[Bar], series: Sequence[str], width: float = 760) -> Image.Image:
    """Horizontal bars from 0, one below the other, each followed by its value."""
    left = PAD + max(text_width(row.label) for row in rows) + 8
    room = width - left - PAD - 50
    top = PAD + LINE + 8 + (LINE + 6)
    canvas = Canvas(width, top + len(rows) * LINE + PAD)
    canvas.text((PAD, PAD + 8), title, TITLE)
    legend(canvas, (PAD, PAD + LINE + 14), series)
    most = max(row.value for row in rows) or 1.0
    for index, row in enumerate(rows):
        y = top + index * LINE
        length = max(row.value, 0.0) / most * room
        canvas.text((left - 8, y + LINE / 2), row.label, anchor="rm")
        canvas.box((left, y + 3), (length, LINE - 6), PALETTE[row.series])
        canvas.text((left + length + 5, y + LINE / 2), number(row.value), SMALL, MUTED)
    return canvas.image


def legend(canvas: Canvas, at: Point, names: Sequence[str]) -> None:
    """Coloured squares with their names, in one line."""
    x, y = at
    for index, name in enumerate(names):
        canvas.box((x, y - 5), (10, 10), PALETTE[index])
        canvas.text((x + 15, y), name, color=MUTED)
        x += 15 + text_width(name) + 18


def ramp(share: float) -> Color:
    """Colour of a share in [0, 1], light to dark."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    pairs = zip(RAMP[low], RAMP[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in pairs)
    return red, green, blue


def log_share(low: float, high: float) -> Callable[[float], float]:
    """Place of a value between `low` and `high` on a logarithmic scale, 0 to 1."""
    span = math.log(high / low) or 1.0
    return lambda value: math.log(max(value, low) / low) / span


@dataclass(frozen=True)
class HeatMap:
    """A table of positive values or None as colours; `share` maps a value to 0 (light) .. 1 (dark).

    text: the text of a cell, if it has room. Empty row_names: the table stands beside another one
    that has them.
    """

    title: str
    cells: Sequence[Sequence[float | None]]
    row_names: Sequence[str]
    column_names: Sequence[str]
    share: Callable[[float], float]
    text: Callable[[float], str] = number
    cell: Point = (40, 22)
    column_title: str = ""

    def draw(self) -> Image.Image:
        names = max((text_width(name) for name in self.row_names), default=0)
        left, top = PAD + names + 8, PAD + LINE + 12 + 2 * LINE
        columns = max(len(row) for row in self.cells)
        body = columns * self.cell[0]
        titles = PAD + text_width(self.title, TITLE), left + text_width(self.column_title)
        width = max(left + body, *titles) + PAD
        canvas = Canvas(width, top + len(self.cells) * self.cell[1] + PAD)
        canvas.text((PAD if self.row_names else left, PAD + 8), self.title, TITLE)
        canvas.text((left, top - LINE - 10), self.column_title, color=MUTED)
        for index, name in enumerate(self.column_names):
            x = left + (index + 0.5) * self.cell[0]
            canvas.text((x, top - 9), name, SMALL, MUTED, "mm")
        for index, row in enumerate(self.cells):
            y = top + index * self.cell[1]
            if self.row_names:
                canvas.text((left - 8, y + self.cell[1] / 2), self.row_names[index], anchor="rm")
            for column, value in enumerate(row):
                self._cell(canvas, (left + column * self.cell[0], y), value)
        return canvas.image

    def _cell(self, canvas: Canvas, corner: Point, value: float | None) -> None:
        width, height = self.cell
        share = None if value is None else self.share(value)
        canvas.box(corner, (width - 1, height - 1), EMPTY if share is None else ramp(share))
        if value is None or share is None:
            return
        text = self.text(value)
        if text_width(text, SMALL) <= width - 4:
            color = WHITE if share > 0.55 else INK
            canvas.text((corner[0] + width / 2, corner[1] + height / 2), text, SMALL, color, "mm")


@dataclass(frozen=True)
class Curves:
    """Lines through points over a common axis; `log` draws y logarithmically.

    x_ticks: (position, text). Series are drawn in the order of their names, the first on top.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_ticks: Sequence[tuple[float, str]]
    x_title: str
    y_title: str
    log: bool = True
    size: Point = (430, 250)

    def draw(self) -> Image.Image:
        width, height = self.size
        names = list(self.series)
        left, top = PAD + 46, PAD + LINE + 30 + LINE * len(names)
        canvas = Canvas(left + width + PAD, top + height + 48)
        canvas.text((PAD, PAD + 8), self.title, TITLE)
        canvas.text((PAD, PAD + LINE + 12), self.y_title, color=MUTED)
        for index, name in enumerate(names):
            legend_row(canvas, (left, PAD + LINE + 30 + index * LINE), name, PALETTE[index])
        canvas.text((left + width / 2, top + height + 36), self.x_title, color=MUTED, anchor="mm")
        place = self._grid(canvas, (left, top))
        for index in reversed(range(len(names))):
            points = [place(point) for point in self.series[names[index]] if self._shown(point)]
            if len(points) > 1:
                canvas.line(points, PALETTE[index])
            for point in points:
                canvas.dot(point, PALETTE[index])
        return canvas.image

    def _shown(self, point: Point) -> bool:
        return not self.log or point[1] > 0

    def _grid(self, canvas: Canvas, corner: Point) -> Callable[[Point], Point]:
        """Ticks and lines; returns the map from values to the canvas."""
        (left, top), (width, height) = corner, self.size
        xs = [x for x, _ in self.x_ticks]
        ys = [p[1] for points in self.series.values() for p in points if self._shown(p)] or [1.0]
        ticks = log_ticks(min(ys), max(ys)) if self.log else linear_ticks(max(ys))
        measure = math.log10 if self.log else float
        low, high = measure(ticks[0]), measure(ticks[-1])

        def place(point: Point) -> Point:
            x = (point[0] - xs[0]) / ((xs[-1] - xs[0]) or 1.0)
            y = (measure(point[1]) - low) / ((high - low) or 1.0)
            return left + 10 + x * (width - 20), top + height * (1 - y)

        for tick in ticks:
            y = place((xs[0], tick))[1]
            canvas.line([(left, y), (left + width, y)], GRID, 1)
            canvas.text((left - 7, y), f"{tick:g}", SMALL, MUTED, "rm")
        for x, text in self.x_ticks:
            at = place((x, ticks[0]))[0]
            canvas.line([(at, top + height), (at, top + height + 4)], MUTED, 1)
            canvas.text((at, top + height + 14), text, SMALL, MUTED, "mm")
        return place


def legend_row(canvas: Canvas, at: Point, name: str, color: Color) -> None:
    canvas.line([at, (at[0] + 18, at[1])], color)
    canvas.dot((at[0] + 9, at[1]), color)
    canvas.text((at[0] + 26, at[1]), name, color=MUTED)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with 2 and 5 between where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    ticks = [10.0**n for n in powers]
    if last - first <= 3:
        ticks = [m * 10.0**n for n in powers for m in (1, 2, 5)]
    start = max((i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9)), default=0)
    end = min((i for i, t in enumerate(ticks) if t >= high * (1 - 1e-9)), default=len(ticks) - 1)
    return ticks[start : max(end, start + 1) + 1]


def linear_ticks(high: float) -> list[float]:
    """0 to at least `high` in four to ten round steps."""
    raw = high / 5 or 0.2
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [index * step for index in range(math.ceil(high / step - 1e-9) + 1 or 1)]
