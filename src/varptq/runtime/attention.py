"""`Attention` on integers, the same for every integer runtime: projections around one kernel call.

    qkv = mat_qkv(x);   codes of q, of cached k and v;   out = proj(softmax codes x value codes)

The cache holds codes that never change (policies "token" and "segment"). What is computed is
defined by `quant.attention`. Shapes as in models/var.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from varptq.models.var import MAX_LOG_SCALE, Attention, Span
from varptq.quant.attention import QuantMix, QuantScores
from varptq.runtime.kernels import AttentionRule, Kernels, Pending
from varptq.runtime.layers import KernelModule

Q_SCALE = 0.25
TENSORS = ("q_bias", "v_bias", "q_factor")


def attention_rule(attention: Attention) -> AttentionRule | None:
    """How `attention` is quantized, or None where its products stay in float."""
    scores, mix = attention.scores, attention.mix
    if not (isinstance(scores, QuantScores) and isinstance(mix, QuantMix)):
        return None
    device, scale = attention.q_bias.device, Q_SCALE / math.sqrt(attention.head_width)
    factor = torch.full((attention.num_heads,), scale, dtype=torch.float32, device=device)
    if attention.l2_norm and not attention.scale_mul_1H11.is_meta:
        factor = attention.scale_mul_1H11.detach().float().clamp_max(MAX_LOG_SCALE).exp().flatten()
    return AttentionRule(
        layer=mix.layer.rpartition(".")[0],
        spec=mix.spec,
        theta=mix.theta,
        num_heads=attention.num_heads,
        head_width=attention.head_width,
        ends=mix.ends,
        l2_norm=attention.l2_norm,
        q_bias=attention.q_bias.detach().float(),
        v_bias=attention.v_bias.detach().float(),
        q_factor=factor,
    )


class IntAttention(KernelModule):
    """Takes the place of an `Attention`; the tensors of its rule are its buffers too."""

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

    def new_cache(self, rows: int, num_tokens: int) -> Any:
        return self.kernels.new_cache(self.rule, rows, num_tokens)

    def forward(self, x_BLC: Tensor | Pending, spans: list[Span], cache: Any = None) -> Tensor:
        """(B, L, C) -> (B, L, C) as `Attention`; without a cache the input is the whole prefix."""
        qkv_BlD = self.mat_qkv(x_BLC, spans)
        if cache is None:
            cache = self.new_cache(qkv_BlD.shape[0], self.rule.ends[-1])
        return self.proj(self.kernels.attend(qkv_BlD, self.rule, cache, spans), spans)
