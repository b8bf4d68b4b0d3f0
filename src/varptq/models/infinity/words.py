"""A text encoder without weights: fixed vectors of words, for the small model that comes with the
package.

    row t = signs(word t) + SHARE_OF_PLACE place(t)

signs: +-1, the bits of a hash of the word, so any two words are nearly orthogonal, all are equally
long, and every machine computes the same. place: sines and cosines (Vaswani et al. 2017). What a
word means, the transformer's `text_proj` and `text_pool` learn. Shapes: T words, D channels.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WORD = re.compile(r"\w+")
SHARE_OF_PLACE = 0.5
PLACE_BASE = 1000.0
KEPT = 4096


class HashedWords:
    """A `TextEncoder` of `channels` D and at most `longest` words; what comes after is cut off.

    Case and punctuation say nothing. A text without words is one row, of a place alone.
    """

    def __init__(self, channels: int, longest: int) -> None:
        self.channels, self.longest = channels, longest

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """One (T, D) float32 tensor per text on the CPU."""
        return [self._features(text) for text in texts]

    def _features(self, text: str) -> Tensor:
        words = WORD.findall(text.casefold())[: self.longest]
        place_TD = SHARE_OF_PLACE * _places(self.longest, self.channels)[: max(1, len(words))]
        if not words:
            return place_TD
        return torch.stack([_signs(word, self.channels) for word in words]) + place_TD


@lru_cache(KEPT)
def _signs(word: str, channels: int) -> Tensor:
    """(D,) of +-1."""
    digest = hashlib.shake_128(word.encode()).digest(-(-channels // 8))
    bits = [byte >> place & 1 for byte in digest for place in range(8)][:channels]
    return torch.tensor(bits, dtype=torch.float32, device="cpu") * 2 - 1


@lru_cache(KEPT)
def _places(count: int, channels: int) -> Tensor:
    """(count, D), sines in the even channels, cosines in the odd ones."""
    rows = [
        [
            math.sin(t / PLACE_BASE ** (2 * (n // 2) / channels) + (math.pi / 2) * (n % 2))
            for n in range(channels)
        ]
        for t in range(count)
    ]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")
