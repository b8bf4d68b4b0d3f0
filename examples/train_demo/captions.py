"""Prompts from pixels: what a picture shows, in words that pixels bear out.

A caption is a function of (pixels, label, seed, number): a noun of the class, and where the
template asks for them a word each for brightness, contrast, the colour in the middle and that at
the rim. So every word but the template's says something about the picture, and can be asked for.
The number alone chooses the template, and every choice is one word: captions of one number are
equally long, which makes a batch of them one group. Templates and synonyms are our own. Shapes: N
images, S their side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from loop import generator
from torch import Tensor

# Per class of CIFAR-10 in alphabetical order; the usual word first.
NOUNS: Sequence[Sequence[str]] = (
    ("airplane", "plane", "jet"),
    ("car", "automobile"),
    ("bird",),
    ("cat", "kitten"),
    ("deer", "stag"),
    ("dog", "puppy"),
    ("frog", "toad"),
    ("horse", "pony"),
    ("ship", "boat"),
    ("truck", "lorry"),
)
# Brightness and contrast: words below, between and above two limits, so that about a fifth of
# CIFAR-10's images is below and another above.
BRIGHTNESS = ("dark", 0.37, "plain", 0.58, "bright")
CONTRAST = ("flat", 0.145, "clear", 0.245, "stark")
# Weights of red, green and blue in luma (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)

# Greys by brightness up to each limit, and hues by the upper end of their range in degrees.
GREY_SATURATION = 0.18
GREYS = ((0.25, "black"), (0.72, "grey"), (1.01, "white"))
HUES = (
    (14, "red"),
    (42, "orange"),
    (70, "yellow"),
    (165, "green"),
    (195, "turquoise"),
    (255, "blue"),
    (290, "purple"),
    (345, "pink"),
    (361, "red"),
)
# What a hue is called where its largest part is below a limit.
DARK = {"red": ("brown", 0.45), "orange": ("brown", 0.62), "yellow": ("olive", 0.62)}

TEMPLATES = (
    "a {noun}",
    "a {color} {noun}",
    "a {bright} photo of a {noun}",
    "a photo of a {color} {noun}",
    "a {bright} photo of a {color} {noun}",
    "a {bright} {stark} picture of a {color} {noun}",
    "a {noun} on a {rim} background",
    "a {color} {noun} on a {rim} background",
    "a {bright} {stark} photo of a {color} {noun} on a {rim} background",
)


@dataclass(frozen=True)
class Seen:
    """What pixels say, a word each."""

    bright: str
    stark: str
    color: str
    rim: str


def seen(pixels_N3SS: Tensor) -> list[Seen]:
    """Of every uint8 image."""
    rgb = pixels_N3SS.float() / 255
    luma_NS2 = (rgb * torch.tensor(LUMA).view(3, 1, 1)).sum(1).flatten(1)
    side = rgb.shape[-1]
    inner = slice(side // 4, side - side // 4)
    middle_N3 = _median(rgb[:, :, inner, inner])
    outside = torch.ones(side, side, dtype=torch.bool)
    outside[side // 8 : side - side // 8, side // 8 : side - side // 8] = False
    rim_N3 = rgb[:, :, outside].median(-1).values
    rows = zip(
        luma_NS2.mean(1).tolist(),
        luma_NS2.std(1).tolist(),
        middle_N3.tolist(),
        rim_N3.tolist(),
        strict=True,
    )
    return [
        Seen(_level(mean, BRIGHTNESS), _level(spread, CONTRAST), color_of(middle), color_of(rim))
        for mean, spread, middle, rim in rows
    ]


def _median(rgb_N3ss: Tensor) -> Tensor:
    return rgb_N3ss.flatten(2).median(-1).values


def _level(value: float, words: tuple[str, float, str, float, str]) -> str:
    low, least, between, most, high = words
    return low if value < least else high if value > most else between


def color_of(rgb: Sequence[float]) -> str:
    """The word for a colour, red, green and blue in [0, 1]."""
    high, low = max(rgb), min(rgb)
    if high < GREYS[0][0] or high - low < GREY_SATURATION * high:
        return next(word for limit, word in GREYS if high < limit)
    word = next(word for limit, word in HUES if _hue(rgb) < limit)
    darker, limit = DARK.get(word, (word, 0.0))
    return darker if high < limit else word


def _hue(rgb: Sequence[float]) -> float:
    """Degrees, for a colour that is no grey."""
    red, green, blue = rgb
    high, span = max(rgb), max(rgb) - min(rgb)
    if high == red:
        return 60 * ((green - blue) / span) % 360
    if high == green:
        return 60 * (2 + (blue - red) / span)
    return 60 * (4 + (red - green) / span)


def caption(picture: Seen, label: int, seed: int, number: int) -> str:
    """One of the captions of a picture."""
    template = TEMPLATES[_drawn(len(TEMPLATES), seed, number)]
    nouns = NOUNS[label]
    # The usual word as often as all others together.
    place = _drawn(2 * len(nouns) - 2, seed, number, label, picture) if len(nouns) > 1 else 0
    return written(template, picture, nouns[place] if place < len(nouns) else nouns[0])


def _drawn(count: int, seed: int, *address: object) -> int:
    draws = generator(seed, "caption", *address)
    return int(torch.randint(count, (), generator=draws))


def written(template: str, picture: Seen, noun: str) -> str:
    """A template filled in, its articles fitting what follows."""
    text = template.format(noun=noun, **vars(picture))
    return re.sub(r"\ba (?=[aeiou])", "an ", text)
