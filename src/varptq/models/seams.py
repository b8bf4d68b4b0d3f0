"""The seams of a transformer: the places where quantizers and runtimes put modules of their own.

A pass over tokens is a list of stages; attention follows spans, "these queries see these keys", so
no mask is stored and the pass over all scales does the same products as one scale after another.
A seam says what it is: a Linear what it reads and of which kind it is, a model which of its Linears
a diagonal can be folded into (`Fold`), and what alone feeds a Linear (`feeds`). What stands above
`models` asks for that and never for the name of a layer.

Shapes: B rows, L tokens, l tokens of one scale, K scales, C width, H heads, c head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.scales import Scales

LAYER_NORM_EPS = 1e-6
RESIDUAL_RATIO = 0.5
PHI_KERNEL = 3
Reads = Literal["tokens", "condition"]


class Span(NamedTuple):
    """Tokens of one scale, at `queries` of the current input. They see all tokens of the scales
    that end at `ends`, their own the last."""

    queries: slice
    ends: tuple[int, ...]

    @property
    def scale(self) -> int:
        """Index of the scale."""
        return len(self.ends) - 1

    @property
    def keys(self) -> int:
        """How many tokens the queries see, from the first on."""
        return self.ends[-1]

    @property
    def length(self) -> int:
        """How many queries there are."""
        return self.queries.stop - self.queries.start


def spans_of(scales: Scales, first: int = 0, end: int | None = None) -> list[Span]:
    """Block causality for an input that holds the tokens of scales `first`..`end` - 1 (default: the
    whole sequence): one span per scale."""
    chosen = range(first, scales.num_scales if end is None else end)
    starts, ends, offset = scales.starts, scales.ends, scales.starts[first]
    return [Span(slice(starts[k] - offset, ends[k] - offset), ends[: k + 1]) for k in chosen]


class LayerCache:
    """Keys and values of one block, preallocated for all L tokens: two tensors (B, H, L, c)."""

    def __init__(self, keys_BHLc: Tensor, values_BHLc: Tensor) -> None:
        self.keys, self.values, self.length = keys_BHLc, values_BHLc, 0

    def append(self, k_BHlc: Tensor, v_BHlc: Tensor) -> tuple[Tensor, Tensor]:
        """Write l new tokens; returns views of all tokens so far."""
        end = self.length + k_BHlc.shape[2]
        self.keys[:, :, self.length : end] = k_BHlc
        self.values[:, :, self.length : end] = v_BHlc
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class TokenLinear(nn.Linear):
    """Seam: a Linear over the tokens of the scales from `first_scale` on. What scale each token is
    of matters to quantizers only. `kind` is what it is in any block, e.g. "fc2"."""

    reads: Reads = "tokens"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: str,
        first_scale: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype=torch.float32)
        self.kind, self.first_scale = kind, first_scale

    def forward(self, input: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        return super().forward(input)

    def tokens_per_image(self, scales: Scales) -> int:
        """How many tokens of one image go through this layer."""
        return scales.num_tokens - scales.starts[self.first_scale]


class ConditionLinear(nn.Linear):
    """Seam: a Linear over one vector per condition, e.g. of a class."""

    reads: Reads = "condition"

    def __init__(self, in_features: int, out_features: int, *, kind: str) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)
        self.kind = kind

    def tokens_per_image(self, scales: Scales) -> int:
        """One at each of the K scales, as the paper counts, although the condition is the same at
        all of them."""
        return scales.num_scales


SeamLinear = TokenLinear | ConditionLinear


class Scores(nn.Module):
    """Seam: attention scores of one span, q k^T. q is already scaled."""

    def forward(self, q_BHlc: Tensor, k_BHLc: Tensor, span: Span) -> Tensor:
        return q_BHlc @ k_BHLc.transpose(-1, -2)


class Mix(nn.Module):
    """Seam: attention-value product of one span, p v."""

    def forward(self, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> Tensor:
        return p_BHlL @ v_BHLc


class ModulatedNorm(nn.Module):
    """Seam: LayerNorm without parameters, then (1 + scale) and shift of the condition."""

    def forward(self, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Tensor:
        normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=LAYER_NORM_EPS)
        return normed_BLC * (1 + scale_B1C) + shift_B1C


class Phi(nn.Conv2d):
    """Seam: phi(h) = 0.5 h + 0.5 conv(h) of the token map, size preserving."""

    def __init__(self, code_dim: int) -> None:
        super().__init__(
            code_dim, code_dim, PHI_KERNEL, padding=PHI_KERNEL // 2, dtype=torch.float32
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, P, P) -> (B, C, P, P)."""
        return (1 - RESIDUAL_RATIO) * input + RESIDUAL_RATIO * super().forward(input)


class NormFold(NamedTuple):
    """`consumer` reads what a `ConditionLinear` scales and shifts: `ada` holds C rows for each
    vector, of which `scale_row` and `shift_row` count. `biases` add to the output, in order of its
    rows."""

    consumer: nn.Linear
    ada: nn.Linear
    scale_row: int
    shift_row: int
    biases: tuple[Tensor, ...]


class ValueFold(NamedTuple):
    """`consumer` reads the mixed values of an attention: rows `rows` of `source` and `bias` make
    them."""

    consumer: nn.Linear
    source: nn.Linear
    rows: slice
    bias: Tensor


Fold = NormFold | ValueFold


class Stage(NamedTuple):
    """One step of a pass: `run(x, spans, cache)` takes the tokens (B, l, C) of all rows on.

    name: of the module that does it. condition_units, token_units: submodules of it whose rounding
    is learned on its own, in the order in which they run; a stage that is itself such a unit is the
    last of the pass.
    """

    name: str
    run: Callable[[Tensor, list[Span], Any], Tensor]
    condition_units: tuple[str, ...] = ()
    token_units: tuple[str, ...] = ()


def run_stages(
    stages: list[Stage], x_BlC: Tensor, spans: list[Span], cache: list[Any] | None = None
) -> Tensor:
    """(B, l, C) through all stages -> float32 logits (B, l, V)."""
    for stage in stages:
        x_BlC = stage.run(x_BlC, spans, cache)
    return x_BlC.float()
