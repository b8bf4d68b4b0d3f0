"""The alphabet of tokens: a token is `draws` draws of one of `size` symbols, such as 1 draw of 4096
or 32 draws of 2.

Logits (B, l, draws size) are sampled as (B, l draws, size), so that samplers, filters and
divergences need not know about draws. Tokens are (B, L) where a token is one draw, else (B, L,
draws).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Alphabet(NamedTuple):
    """`draws` independent draws of `size` symbols make a token."""

    draws: int
    size: int

    def by_draw(self, logits_BlV: Tensor) -> Tensor:
        """Logits (B, l, draws size) -> (B, l draws, size)."""
        if self.draws == 1:
            return logits_BlV
        return logits_BlV.unflatten(-1, (self.draws, self.size)).flatten(1, 2)

    def tokens(self, symbols_BL: Tensor) -> Tensor:
        """Symbols (B, l draws) in the order of `by_draw` -> tokens (B, l) or (B, l, draws)."""
        return symbols_BL if self.draws == 1 else symbols_BL.unflatten(1, (-1, self.draws))

    def symbols(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`: (B, l) or (B, l, draws) -> (B, l draws)."""
        return tokens if self.draws == 1 else tokens.flatten(1)

    def per_token(self, values_BL: Tensor) -> Tensor:
        """Sums over the draws of a token: (B, l draws) -> (B, l)."""
        return values_BL if self.draws == 1 else self.tokens(values_BL).sum(-1)

    def shape(self, count: int, length: int) -> tuple[int, ...]:
        """Shape of the tokens of `count` images with `length` tokens each."""
        return (count, length) if self.draws == 1 else (count, length, self.draws)
