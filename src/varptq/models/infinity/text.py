"""What Infinity makes of a text once per image: a norm, one pooled vector, and the tokens that the
blocks' cross-attention reads (Infinity, Han et al., CVPR 2025).

Shapes: R texts of one length, T tokens of a text, D channels of the text encoder, C width, H heads
of the pool, c their width.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from varptq.models.seams import TextLinear, TextSummary, ValueFold

NORM_EPS = 1e-6


class TextNorm(nn.Module):
    """f / sqrt(mean(f^2) + eps) * weight, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32))

    def forward(self, features_RTD: Tensor) -> Tensor:
        wide_RTD = features_RTD.float()
        normed_RTD = wide_RTD * (wide_RTD.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return (normed_RTD * self.weight.float()).to(self.weight.dtype)


class TextPool(TextSummary):
    """Attention of one learned query per head over a text: (R, T, D) -> (R, C)."""

    def __init__(self, channels: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.query_1Hc = nn.Parameter(
            torch.zeros(1, num_heads, self.head_width, dtype=torch.float32)
        )
        self.mat_kv = TextLinear(channels, 2 * width, bias=False, kind="pool_kv")
        self.v_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.register_buffer("zero_k_bias", torch.zeros(width, dtype=torch.float32))
        self.proj = TextLinear(width, width, kind="pool_proj", pooled=True)

    def fold_of_values(self) -> ValueFold:
        """Where a diagonal on the input of `proj` goes."""
        width = self.proj.in_features
        return ValueFold(self.proj, self.mat_kv, slice(width, 2 * width), self.v_bias)

    def forward(self, features_RTD: Tensor) -> Tensor:
        bias = torch.cat((cast(Tensor, self.zero_k_bias), self.v_bias))
        keys_values = (self.mat_kv(features_RTD) + bias).unflatten(-1, (2, -1, self.head_width))
        k_RHTc, v_RHTc = keys_values.permute(2, 0, 3, 1, 4).unbind(0)
        q_1H1c = self.query_1Hc.unsqueeze(2) / math.sqrt(self.head_width)
        p_RH1T = (q_1H1c @ k_RHTc.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)
        mixed_RH1c = p_RH1T.to(v_RHTc.dtype) @ v_RHTc
        return self.proj(mixed_RH1c.transpose(1, 2).flatten(2)).squeeze(1)


def text_proj(channels: int, width: int) -> nn.Sequential:
    """What the blocks read of a text: (R, T, D) -> (R, T, C)."""
    return nn.Sequential(
        TextLinear(channels, width, kind="text_fc1"),
        nn.GELU(approximate="tanh"),
        TextLinear(width, width, kind="text_fc2"),
    )
