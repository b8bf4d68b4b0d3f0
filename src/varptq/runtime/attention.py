"""`Attention` and `CrossAttention` on integers, the same for every integer runtime: projections
around one kernel call.

    qkv = mat_qkv(x);   codes of q, of cached k and v;   out = proj(softmax codes x value codes)

The cache holds codes that never change (policies "token" and "segment"). Texts are quantized when a
block first reads them, group by group of one length, so that no row depends on the texts beside
it. What is computed is defined by `quant.attention`. Shapes as in models/seams.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from varptq.models.blocks import Attention
from varptq.models.cross import CrossAttention, TextCache, TextGroup
from varptq.models.rotary import Rotary
from varptq.models.scales import Scales
from varptq.models.seams import Span
from varptq.quant.attention import QuantMix, QuantScores
from varptq.quant.buffers import TypedBuffers
from varptq.runtime.kernels import AttentionRule, Kernels, Pending, TextKernels

TENSORS = ("q_bias", "v_bias", "q_factor")


def attention_rule(attention: Attention | CrossAttention) -> AttentionRule | None:
    """How `attention` is quantized, or None where its products stay in float."""
    scores, mix = attention.scores, attention.mix
    if not (isinstance(scores, QuantScores) and isinstance(mix, QuantMix)):
        return None
    v_bias = attention.v_bias.detach().float()
    if isinstance(attention, Attention):
        l2_norm, q_bias = attention.l2_norm, attention.q_bias.detach().float()
        q_factor = attention.query_factor()
    else:
        # Its queries come from a Linear that has a bias.
        l2_norm, q_bias = False, torch.zeros_like(v_bias)
        q_factor = v_bias.new_full((attention.num_heads,), 1 / math.sqrt(attention.head_width))
    return AttentionRule(
        layer=mix.layer.rpartition(".")[0],
        spec=mix.spec,
        theta=mix.theta,
        num_heads=attention.num_heads,
        head_width=attention.head_width,
        l2_norm=l2_norm,
        q_bias=q_bias,
        v_bias=v_bias,
        q_factor=q_factor,
    )


def _key_bias(attention: Attention | CrossAttention) -> Tensor | None:
    """(3 C,) or (2 C,), zeros but for the keys'; None where they have none, as VAR's."""
    keys = cast(Tensor, attention.zero_k_bias).detach().float()
    if not bool(keys.any()):
        return None
    zeros = torch.zeros_like(keys)
    before = (zeros,) if isinstance(attention, Attention) else ()
    return torch.cat((*before, keys, zeros))


class RuledModule(TypedBuffers):
    """A module whose rule's tensors are registered as buffers too.

    Kernels know biases of q and v. `key_bias` is added to what the projection makes, in a model
    whose keys have one; else it is None."""

    key_bias: Tensor | None

    def __init__(self, rule: AttentionRule, attention: Attention | CrossAttention) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("key_bias", _key_bias(attention))
        for name in TENSORS:
            self.register_buffer(name, getattr(rule, name))

    def with_key_bias(self, projected: Tensor) -> Tensor:
        return projected if self.key_bias is None else projected + self.key_bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.rule = replace(self.rule, **{name: self._buffers[name] for name in TENSORS})
        return self


class IntAttention(RuledModule):
    """Replaces an `Attention`."""

    def __init__(self, attention: Attention, kernels: Kernels, rule: AttentionRule) -> None:
        super().__init__(rule, attention)
        self.kernels = kernels
        self.mat_qkv, self.proj = attention.mat_qkv, attention.proj

    def new_cache(self, rows: int, scales: Scales) -> Any:
        return self.kernels.new_cache(self.rule, rows, scales.ends)

    def forward(
        self,
        x_BLC: Tensor | Pending,
        spans: list[Span],
        cache: Any = None,
        tables: Rotary | None = None,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C) as `Attention`; without a cache the input is the whole prefix."""
        qkv_BlD = self.with_key_bias(self.mat_qkv(x_BLC, spans))
        if cache is None:
            cache = self.kernels.new_cache(self.rule, qkv_BlD.shape[0], spans[-1].ends)
        return self.proj(self.kernels.attend(qkv_BlD, self.rule, cache, spans, tables), spans)


class TextCodes(NamedTuple):
    """What the kernels have made of the texts of rows `rows_R`, all of `length` tokens."""

    rows_R: Tensor
    length: int
    codes: Any


class IntCrossAttention(RuledModule):
    """Replaces a `CrossAttention`."""

    def __init__(
        self, attention: CrossAttention, kernels: TextKernels, rule: AttentionRule
    ) -> None:
        super().__init__(rule, attention)
        self.kernels = kernels
        self.mat_q, self.mat_kv, self.proj = attention.mat_q, attention.mat_kv, attention.proj

    def new_cache(self) -> TextCache:
        return TextCache()

    def forward(
        self,
        x_BLC: Tensor | Pending,
        spans: list[Span],
        text: Sequence[TextGroup],
        cache: TextCache | None = None,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C) as `CrossAttention`."""
        q_BLC = self.mat_q(x_BLC, spans)
        out_BLC = torch.empty_like(q_BLC)
        cache = TextCache() if cache is None else cache
        if cache.keys is None:
            cache.keys = [self._read(group) for group in text]
        for rows_R, length, codes in cache.keys:
            own = [span.over_text(length) for span in spans]
            out_BLC[rows_R] = self.kernels.answer(q_BLC[rows_R], self.rule, codes, own)
        return self.proj(out_BLC, spans)

    def _read(self, group: TextGroup) -> TextCodes:
        kv_RTD = self.with_key_bias(self.mat_kv(group.text_RTC))
        return TextCodes(group.rows_R, kv_RTD.shape[1], self.kernels.read(kv_RTD, self.rule))
