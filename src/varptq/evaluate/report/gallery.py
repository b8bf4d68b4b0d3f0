"""The sample grid: the two images of a seed one above the other, as PNG inside the page.

Pictures are embedded at their own size and enlarged by the browser without smoothing. Their total
size is bounded, so that the page can be sent by mail.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from varptq.evaluate.report.markup import Markup, element, join
from varptq.evaluate.sampling import SampleSet
from varptq.pictures import Pixels

# Limits of a page: raw bytes of all pictures, and pairs that a reader will look at.
MAX_BYTES, MAX_PAIRS = 5_000_000, 40
# Images from this side on get more room.
LARGE = 128


class Pair(NamedTuple):
    """Images (H, W, 3) uint8 of one seed; `above` is None without a float model. `agreement`:
    share of equal tokens."""

    title: str
    above: Pixels | None
    image: Pixels
    agreement: float | None


def choose_pairs(samples: SampleSet, above: SampleSet | None, titles: Sequence[str]) -> list[Pair]:
    """The first images of each class, as many of each as there is room for, class by class."""
    found: list[tuple[int, Pair]] = []
    for label, pair in _pairs(samples, above, titles):
        found.append((label, pair))
        if len(found) == MAX_PAIRS or _bytes(pair) * (len(found) + 1) > MAX_BYTES:
            break
    return [pair for _, pair in sorted(found, key=lambda item: item[0])]


def _bytes(pair: Pair) -> int:
    return pair.image.nbytes * (1 if pair.above is None else 2)


def _pairs(
    samples: SampleSet, above: SampleSet | None, titles: Sequence[str]
) -> Iterator[tuple[int, Pair]]:
    others = above.shards() if above is not None else None
    for shard in samples.shards():
        other = next(others) if others is not None else None
        for i, label in enumerate(map(int, shard.labels)):
            name = titles[label]
            if other is None:
                yield label, Pair(name, None, shard.images[i], None)
                continue
            agreement = float((shard.tokens[i] == other.tokens[i]).mean())
            yield label, Pair(name, other.images[i], shard.images[i], agreement)


def gallery(pairs: Sequence[Pair]) -> Markup:
    """All pairs as figures; the page's style puts them side by side."""
    large = bool(pairs) and pairs[0].image.shape[1] >= LARGE
    figures = (_figure(pair) for pair in pairs)
    return element("div", *figures, class_="pairs large" if large else "pairs")


def _figure(pair: Pair) -> Markup:
    caption: list[object] = [pair.title]
    if pair.agreement is not None:
        says = f"{pair.agreement:.0%} of the tokens are equal"
        caption += [" ", element("span", f"{pair.agreement:.0%}", title=says)]
    pictures = [_picture(pair.image, f"{pair.title}, quantized" if pair.above is not None else "")]
    if pair.above is not None:
        pictures.insert(0, _picture(pair.above, f"{pair.title}, float"))
    return element("figure", *pictures, element("figcaption", join(*caption)))


def _picture(image: Pixels, says: str) -> Markup:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    height, width, _ = image.shape
    return element("img", src=source, alt=says, width=width, height=height)
