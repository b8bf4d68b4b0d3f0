"""Which token maps Infinity draws at which size and shape (Han et al., CVPR 2025).

A template is a ratio height / width with 13 maps. A size is a prefix of them, and the image is 16
pixels a cell of its last map. Rotary positions lie over the last map of the whole template at every
size. Templates below 1 are those above with their sides exchanged.
"""

from __future__ import annotations

from typing import Any

from varptq.errors import InputError
from varptq.models.scales import Scales, Size

PIXELS = 16
SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
# Heights and widths of the maps per template.
_TALL: dict[float, tuple[tuple[int, ...], tuple[int, ...]]] = {
    1.0: (
        (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
        (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
    ),
    1.25: (
        (1, 2, 3, 5, 10, 15, 20, 25, 30, 35, 45, 55, 70),
        (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 36, 44, 56),
    ),
    1.333: (
        (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 48, 60, 72),
        (1, 2, 3, 6, 9, 12, 15, 18, 21, 27, 36, 45, 54),
    ),
    1.5: (
        (1, 2, 3, 6, 9, 15, 21, 27, 33, 39, 48, 63, 78),
        (1, 2, 2, 4, 6, 10, 14, 18, 22, 26, 32, 42, 52),
    ),
    1.75: (
        (1, 2, 3, 7, 11, 14, 21, 28, 35, 42, 56, 70, 84),
        (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48),
    ),
    2.0: (
        (1, 2, 4, 6, 10, 16, 22, 30, 38, 46, 60, 74, 90),
        (1, 2, 2, 3, 5, 8, 11, 15, 19, 23, 30, 37, 45),
    ),
    2.5: (
        (1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 65, 80, 100),
        (1, 2, 2, 4, 6, 8, 10, 12, 16, 20, 26, 32, 40),
    ),
    3.0: (
        (1, 2, 6, 9, 15, 21, 27, 36, 45, 54, 72, 90, 111),
        (1, 2, 2, 3, 5, 7, 9, 12, 15, 18, 24, 30, 37),
    ),
}
# The names of the inverses are cut, not rounded.
_INVERSES = {
    1.25: 0.8,
    1.333: 0.75,
    1.5: 0.666,
    1.75: 0.571,
    2.0: 0.5,
    2.5: 0.4,
    3.0: 0.333,
}


def _templates() -> dict[float, tuple[Size, ...]]:
    """Maps per template, in the order in which the nearest one is looked for."""
    found: dict[float, tuple[Size, ...]] = {}
    for ratio, (heights, widths) in _TALL.items():
        found[ratio] = tuple(zip(heights, widths, strict=True))
        if ratio in _INVERSES:
            found[_INVERSES[ratio]] = tuple(zip(widths, heights, strict=True))
    return found


TEMPLATES = _templates()


def template_of(ratio: float) -> float:
    """The template nearest to height / width."""
    return min(TEMPLATES, key=lambda template: abs(template - ratio))


def schedule(count: int, template: float = 1.0) -> Scales:
    """The first `count` maps of a template, with the grid of all of them."""
    maps = TEMPLATES[template]
    return Scales(maps[:count], maps[-1])


def is_published(scales: Scales) -> bool:
    """Whether these are the first maps of a template."""
    return scales == schedule(scales.num_scales, _ratio(scales))


def reshaped(scales: Scales, ratio: float) -> Scales:
    """As many maps of the template nearest to height / width; other schedules stay."""
    if not is_published(scales):
        return scales
    return schedule(scales.num_scales, template_of(ratio))


def size_names(most: int) -> tuple[str, ...]:
    """What `schedule_for` calls the sizes of at most so many maps, square ones first."""
    known = [name for name, count in SIZES.items() if count <= most]
    ratios = sorted(ratio for ratio in TEMPLATES if ratio != 1)
    return (*known, *(f"{name}:{ratio:g}" for name in known for ratio in ratios))


def _ratio(scales: Scales) -> float:
    height, width = scales.grid or scales.last
    return template_of(height / width)


def schedule_for(size: Any) -> Scales:
    """The schedule for a size name ("1M", or "1M:1.5" with a ratio height / width), or for (height,
    width) in pixels. Raises `InputError` for a size that has none."""
    if isinstance(size, str):
        name, _, ratio = size.partition(":")
        try:
            return schedule(SIZES[name], template_of(float(ratio or 1)))
        except (KeyError, ValueError):
            raise InputError(
                f"size {size!r}: expected one of {', '.join(SIZES)}, with :RATIO (height / width) "
                "where it is not square, or (height, width) in pixels"
            ) from None
    try:
        height, width = (int(side) for side in size)
        maps = TEMPLATES[template_of(height / width)]
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError(
            f"size {size!r}: expected a name ({', '.join(SIZES)}) or (height, width) in pixels"
        ) from None
    images = [(PIXELS * h, PIXELS * w) for h, w in maps]
    if (height, width) not in images:
        near = min(images, key=lambda image: abs(image[0] * image[1] - height * width))
        raise InputError(
            f"size {height}x{width}: not one that the model draws, the nearest is "
            f"{near[0]}x{near[1]}"
        )
    return Scales(maps[: images.index((height, width)) + 1], maps[-1])
