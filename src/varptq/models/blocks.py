"""The parts that transformers of this kind are made of: attention, feed-forward and their block.

    block:  x += attn(LN(x) (1 + scale1) + shift1) gamma1;   x += ffn(LN(x) (1 + scale2) + shift2)
    gamma2

A model that reads a text has cross-attention between the two; it is in `cross.py`.

They take numbers, never an architecture: a family calls them with its own. Nothing here knows of
quantization; the seams are in `seams.py`. Source: VAR (Tian et al., NeurIPS 2024),
docs/method.md section 1. Shapes as in `seams.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.room import MEMORY, Room
from varptq.models.rotary import Rotary
from varptq.models.scales import Scales
from varptq.models.seams import (
    ConditionLinear,
    Fold,
    Gain,
    GainFold,
    GatedSum,
    LayerCache,
    Mix,
    ModulatedNorm,
    NormFold,
    Scores,
    Span,
    TokenLinear,
    ValueFold,
)

MLP_RATIO = 4
MAX_LOG_SCALE = math.log(100.0)
INIT_LOG_SCALE = math.log(4.0)
Q_SCALE = 0.25
# Vectors of a block's condition, in this order.
GAMMA1, GAMMA2, SCALE1, SCALE2, SHIFT1, SHIFT2 = range(6)
# Modulated norms of a block: before attention, and before feed-forward.
NORMS = 2


class Attention(nn.Module):
    """Self-attention. With `l2_norm` q and k are unit vectors and q carries exp(min(scale_mul, log
    100)); without it q is scaled by 0.25 / sqrt(c). With `rotary` both are then turned by the
    tables that a call hands in; a cache holds the turned keys. room: where caches are."""

    room: Room = MEMORY

    def __init__(self, width: int, num_heads: int, *, l2_norm: bool, rotary: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.l2_norm, self.rotary = l2_norm, rotary
        self.mat_qkv = TokenLinear(width, 3 * width, bias=False, kind="mat_qkv")
        self.q_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.v_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.register_buffer("zero_k_bias", torch.zeros(width, dtype=torch.float32))
        if l2_norm:
            scale = torch.full((1, num_heads, 1, 1), INIT_LOG_SCALE, dtype=torch.float32)
            self.scale_mul_1H11 = nn.Parameter(scale)
        self.proj = TokenLinear(width, width, kind="proj")
        self.scores = Scores()
        self.mix = Mix()

    def new_cache(self, rows: int, scales: Scales) -> LayerCache:
        """Preallocated keys and values of this block for `rows` rows of all tokens of `scales`."""
        shape = (rows, self.num_heads, scales.num_tokens, self.head_width)
        keys_BHLc, values_BHLc = (self.room.empty(shape, self.q_bias) for _ in range(2))
        return LayerCache(keys_BHLc, values_BHLc, self.room)

    def query_factor(self) -> Tensor:
        """(H,) float32: what q is multiplied with."""
        if not self.l2_norm:
            scale, device = Q_SCALE / math.sqrt(self.head_width), self.q_bias.device
            return torch.full((self.num_heads,), scale, dtype=torch.float32, device=device)
        scale_H = self.scale_mul_1H11.detach().float().flatten()
        # Of shapes alone torch would load its compiler, which takes seconds, to follow the rest.
        return scale_H if scale_H.is_meta else scale_H.clamp_max(MAX_LOG_SCALE).exp()

    def fold_of_values(self) -> ValueFold:
        """Where a diagonal on the input of `proj` is folded into."""
        width = self.proj.in_features
        return ValueFold(self.proj, self.mat_qkv, slice(2 * width, 3 * width), self.v_bias)

    def forward(
        self,
        x_BLC: Tensor,
        spans: list[Span],
        cache: LayerCache | None = None,
        tables: Rotary | None = None,
    ) -> Tensor:
        """(B, L, C) -> (B, L, C); `spans` index the queries of `x_BLC` and count keys in cache +
        input. `tables` cover the whole schedule."""
        assert self.rotary == (tables is not None), "rotary attention wants its tables"
        q_BHLc, k_BHLc, v_BHLc = self._qkv(x_BLC, spans)
        if tables is not None:
            places = slice(spans[0].keys - spans[0].length, spans[-1].keys)
            q_BHLc, k_BHLc = tables.turn(q_BHLc, places), tables.turn(k_BHLc, places)
        if cache is not None:
            k_BHLc, v_BHLc = cache.append(k_BHLc, v_BHLc)
        mixed = [
            self._attend(q_BHLc[:, :, s.queries], k_BHLc[:, :, : s.keys], v_BHLc[:, :, : s.keys], s)
            for s in spans
        ]
        out_BHLc = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)
        return self.proj(out_BHLc.transpose(1, 2).flatten(2), spans)

    def _attend(self, q_BHlc: Tensor, k_BHLc: Tensor, v_BHLc: Tensor, span: Span) -> Tensor:
        scores_BHlL = self.scores(q_BHlc, k_BHLc, span)
        p_BHlL = scores_BHlL.softmax(dim=-1, dtype=torch.float32)
        return self.mix(p_BHlL.to(v_BHLc.dtype), v_BHLc, span)

    def _qkv(self, x_BLC: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat((self.q_bias, cast(Tensor, self.zero_k_bias), self.v_bias))
        qkv = self.mat_qkv(x_BLC, spans) + bias
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_width))
        q_BHLc, k_BHLc, v_BHLc = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if not self.l2_norm:
            return q_BHLc * (Q_SCALE / math.sqrt(self.head_width)), k_BHLc, v_BHLc
        temperature = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
        return F.normalize(q_BHLc, dim=-1) * temperature, F.normalize(k_BHLc, dim=-1), v_BHLc


class FeedForward(nn.Module):
    """fc2(GELU_tanh(fc1(x))), four times as wide within unless `hidden` says otherwise."""

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = MLP_RATIO * width if hidden is None else hidden
        self.fc1 = TokenLinear(width, hidden, kind="fc1")
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = TokenLinear(hidden, width, kind="fc2")

    def forward(self, x_BLC: Tensor, spans: Sequence[Span]) -> Tensor:
        return self.fc2(self.act(self.fc1(x_BLC, spans)), spans)


def ada_lin(
    width: int, vectors: int, kind: str = "ada_lin", *, once: bool = False
) -> nn.Sequential:
    """AdaLN: `vectors` vectors of the width from an embedding of the condition."""
    return nn.Sequential(nn.SiLU(), ConditionLinear(width, vectors * width, kind=kind, once=once))


class HeadNorm(nn.Module):
    """LayerNorm before the head, modulated by its own AdaLN layer (scale, shift)."""

    def __init__(self, width: int, *, once: bool = False) -> None:
        super().__init__()
        self.norm = ModulatedNorm()
        self.ada_lin = ada_lin(width, 2, once=once)

    def modulation(self, condition_BC: Tensor) -> Tensor:
        """(B, C) -> (B, 1, 2, C)."""
        return self.ada_lin(condition_BC).unflatten(-1, (1, 2, -1))

    def forward(self, x_BLC: Tensor, ada_B12C: Tensor) -> Tensor:
        scale, shift = ada_B12C.unbind(2)
        return self.norm(x_BLC, scale, shift)


def gain_folds(gain: Gain, ada_gss: Tensor, mat_qkv: nn.Linear, fc1: nn.Linear) -> dict[str, Fold]:
    """Of a block whose AdaLN layer is shared, which has no rows of its own to scale."""
    return {
        "attn.mat_qkv": GainFold(mat_qkv, gain, 0, ada_gss),
        "ffn.fc1": GainFold(fc1, gain, 1, ada_gss),
    }


class Block(nn.Module):
    """One transformer block. Its AdaLN vectors come from its own `ada_lin`, or with shared AdaLN
    (d36) from `ada_gss` plus the output of the shared layer."""

    # What alone feeds a Linear, so that its quantizer can carry it out while it reads.
    FEEDS = (("norm1", "attn.mat_qkv"), ("norm2", "ffn.fc1"), ("ffn.act", "ffn.fc2"))

    def __init__(self, width: int, num_heads: int, *, l2_norm: bool, shared_adaln: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = ModulatedNorm(), ModulatedNorm()
        self.attn = Attention(width, num_heads, l2_norm=l2_norm)
        self.ffn = FeedForward(width)
        self.sum = GatedSum()
        self.shared_adaln = shared_adaln
        if shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width, dtype=torch.float32))
            self.ada_gain = Gain(NORMS)
        else:
            self.ada_lin = ada_lin(width, 6)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, C) embedding of the condition, or (B, 1, 6, C) from the shared layer -> (B, 1, 6,
        C)."""
        if condition.dim() == 4:
            return self.ada_gain(self.ada_gss + condition)
        return self.ada_lin(condition).unflatten(-1, (1, 6, -1))

    def folds(self) -> dict[str, Fold]:
        """Linears of this block, by name, whose input a diagonal can be folded into what makes
        it."""
        attention, fc1 = self.attn, self.ffn.fc1
        if self.shared_adaln:
            found = gain_folds(self.ada_gain, self.ada_gss, attention.mat_qkv, fc1)
            return {**found, "attn.proj": attention.fold_of_values()}
        biases = (attention.q_bias, cast(Tensor, attention.zero_k_bias), attention.v_bias)
        ada = cast(ConditionLinear, self.ada_lin[1])
        return {
            "attn.mat_qkv": NormFold(attention.mat_qkv, ada, SCALE1, SHIFT1, biases),
            "ffn.fc1": NormFold(fc1, ada, SCALE2, SHIFT2, (fc1.bias,)),
            "attn.proj": attention.fold_of_values(),
        }

    def forward(
        self, x_BLC: Tensor, ada_B16C: Tensor, spans: list[Span], cache: LayerCache | None = None
    ) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada_B16C.unbind(2)
        mixed_BLC = self.attn(self.norm1(x_BLC, scale1, shift1), spans, cache)
        x_BLC = self.sum(x_BLC, mixed_BLC, gamma1)
        return self.sum(x_BLC, self.ffn(self.norm2(x_BLC, scale2, shift2), spans), gamma2)
