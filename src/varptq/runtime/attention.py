"""`Attention` on integers, the same for every integer runtime: projections around one kernel call.

    qkv = mat_qkv(x);   codes of q, of cached k and v;   out = proj(softmax codes x value codes)

The cache holds codes that never change (policies "token" and "segment"). What is computed is
defined by `quant.attention`. Shapes as in models/seams.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from torch import Tensor

from varptq.models.blocks import Attention
from varptq.models.scales import Scales
from varptq.models.seams import Span
from varptq.quant.attention import QuantMix, QuantScores
from varptq.runtime.kernels import AttentionRule, Kernels, Pending
from varptq.runtime.layers import KernelModule

TENSORS = ("q_bias", "v_bias", "q_factor")


def attention_rule(attention: Attention) -> AttentionRule | None:
    """How `attention` is quantized, or None where its products stay in float."""
    scores, mix = attention.scores, attention.mix
    if not (isinstance(scores, QuantScores) and isinstance(mix, QuantMix)):
        return None
    return AttentionRule(
        layer=mix.layer.rpartition(".")[0],
        spec=mix.spec,
        theta=mix.theta,
        num_heads=attention.num_heads,
        head_width=attention.head_width,
        l2_norm=attention.l2_norm,
        q_bias=attention.q_bias.detach().float(),
        v_bias=attention.v_bias.detach().float(),
        q_factor=attention.query_factor(),
    )


class IntAttention(KernelModule):
    """Replaces an `Attention`; the tensors of its rule are registered as buffers too."""

    def __init__(self, attention: Attention, kernels: Kernels, rule: AttentionRule) -> None:
        super().__init__()
        self.rule, self.kernels = rule, kernels
        self.mat_qkv, self.proj = attention.mat_qkv, attention.proj
        for name in TENSORS:
            self.register_buffer(name, getattr(rule, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children():
            child._apply(fn)
        self._move(fn)
        self.rule = replace(self.rule, **{name: self._buffers[name] for name in TENSORS})
        return self

    def new_cache(self, rows: int, scales: Scales) -> Any:
        return self.kernels.new_cache(self.rule, rows, scales.ends)

    def forward(self, x_BLC: Tensor | Pending, spans: list[Span], cache: Any = None) -> Tensor:
        """(B, L, C) -> (B, L, C) as `Attention`; without a cache the input is the whole prefix."""
        qkv_BlD = self.mat_qkv(x_BLC, spans)
        if cache is None:
            cache = self.kernels.new_cache(self.rule, qkv_BlD.shape[0], spans[-1].ends)
        return self.proj(self.kernels.attend(qkv_BlD, self.rule, cache, spans), spans)
