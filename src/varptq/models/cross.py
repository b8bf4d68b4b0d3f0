"""Cross-attention over a text, and the form in which it takes the text.

Rows have texts of different lengths, and a padded key would change the attention of every head. So
a text is a list of groups, rows of one length each, and every product is done group by group: what
stands in a seam sees plain (rows, H, l, T) tensors and no mask, and a row never depends on the
texts beside it. Guidance makes groups of two rows at least, as what is asked for and nothing are of
one length.

Plain heads: scale 1 / sqrt(c), no normalisation of q and k, no rotary positions (Infinity, Han et
al., CVPR 2025). Shapes as in `seams.py`; R rows of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from varptq.models.room import MEMORY, Room
from varptq.models.seams import (
    Mix,
    Scores,
    Span,
    TextLinear,
    TokenLinear,
    ValueFold,
    mixes_of,
)


class TextGroup(NamedTuple):
    """Rows `rows_R` (int64, CPU) of a batch and their texts, all of T tokens: (R, T, C)."""

    rows_R: Tensor
    text_RTC: Tensor


class Mixes(NamedTuple):
    """The attention-value products of a network by name of their attention, in model order: those
    over tokens, and those over a text."""

    tokens: dict[str, Mix]
    text: dict[str, Mix]

    @classmethod
    def of(cls, network: nn.Module) -> Mixes:
        found = cls({}, {})
        for name, mix in mixes_of(network).items():
            over_text = isinstance(network.get_submodule(name), CrossAttention)
            (found.text if over_text else found.tokens)[name] = mix
        return found


class Keys(NamedTuple):
    """Keys and values of the texts of rows `rows_R`, (R, H, T, c) each."""

    rows_R: Tensor
    k_RHTc: Tensor
    v_RHTc: Tensor


class TextCache:
    """What one block has made of the texts, the same at all scales: `Keys`, or what a runtime keeps
    in their place. None before the first scale."""

    def __init__(self) -> None:
        self.keys: list[Any] | None = None

    def first_rows(self, rows: int) -> TextCache:
        """An empty one: texts are grouped over all rows, so fewer rows group and read anew."""
        return TextCache()


class CrossAttention(nn.Module):
    """Queries of the tokens over keys and values of a text. room: where a cache keeps these."""

    room: Room = MEMORY

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.mat_q = TokenLinear(width, width, kind="cross_q")
        self.mat_kv = TextLinear(width, 2 * width, bias=False, kind="cross_kv")
        self.v_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.register_buffer("zero_k_bias", torch.zeros(width, dtype=torch.float32))
        self.proj = TokenLinear(width, width, kind="cross_proj")
        self.scores = Scores()
        self.mix = Mix()

    def new_cache(self) -> TextCache:
        return TextCache()

    def fold_of_values(self) -> ValueFold:
        """Where a diagonal on the input of `proj` is folded into."""
        width = self.proj.in_features
        return ValueFold(self.proj, self.mat_kv, slice(width, 2 * width), self.v_bias)

    def forward(
        self,
        x_BLC: Tensor,
        spans: list[Span],
        text: Sequence[TextGroup],
        cache: TextCache | None = None,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C); the groups of `text` hold every row once. A cache keeps what is
        made of the text."""
        q_BHLc = self._heads(self.mat_q(x_BLC, spans)) / math.sqrt(self.head_width)
        out_BHLc = torch.empty_like(q_BHLc)
        for group in self._keys(text, cache):
            rows_R = group.rows_R.to(x_BLC.device)
            q_RHLc = q_BHLc[rows_R]
            mixed = [self._attend(q_RHLc[:, :, span.queries], group, span) for span in spans]
            out_BHLc[rows_R] = torch.cat(mixed, dim=2)
        return self.proj(out_BHLc.transpose(1, 2).flatten(2), spans)

    def _attend(self, q_RHlc: Tensor, keys: Keys, span: Span) -> Tensor:
        span = span.over_text(keys.k_RHTc.shape[2])
        scores_RHlT = self.scores(q_RHlc, keys.k_RHTc, span)
        p_RHlT = scores_RHlT.softmax(dim=-1, dtype=torch.float32)
        return self.mix(p_RHlT.to(keys.v_RHTc.dtype), keys.v_RHTc, span)

    def _keys(self, text: Sequence[TextGroup], cache: TextCache | None) -> list[Keys]:
        if cache is None:
            return self._keys_of(text, MEMORY)
        if cache.keys is None:
            cache.keys = self._keys_of(text, self.room)
        self.room.enter(*(group.k_RHTc for group in cache.keys))
        return cache.keys

    def _keys_of(self, text: Sequence[TextGroup], room: Room) -> list[Keys]:
        bias = torch.cat((cast(Tensor, self.zero_k_bias), self.v_bias))
        keys: list[Keys] = []
        for group in text:
            k_RTC, v_RTC = room.keep(self.mat_kv(group.text_RTC) + bias).chunk(2, dim=-1)
            keys.append(Keys(group.rows_R, self._heads(k_RTC), self._heads(v_RTC)))
        return keys

    def _heads(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) -> (B, H, L, c)."""
        return x_BLC.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
