"""Simulated quantized layers: what stands in the seams of the float model after conversion.

    QuantLinear   y = fake(x) W^T + b,   W = (codes - zero_point) * scale per output row and group
    QuantScores   fake(q) fake(k)^T
    QuantMix      fake(p) fake(v),  v with shift-and-sum where attention mass is high

They compute in float on dequantized codes ("simulated"): the arithmetic of every quantizer is the
pure function in its own file, and runtimes on integers are held against these layers. Shapes as in
models/var.py; G groups of g input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.errors import NonFiniteError
from varptq.models.var import Mix, Scores, Span
from varptq.quant import adaround
from varptq.quant.affine import (
    Grid,
    affine_codes,
    affine_fake,
    affine_grid,
    affine_values,
    from_groups,
    to_groups,
    wide,
)
from varptq.quant.config import AttentionSpec, LinearSpec, TensorSpec
from varptq.quant.probability import probability_fake
from varptq.quant.shift_sum import orders, shift_sum_fake
from varptq.quant.sign_split import sign_split_fake


def weight_grid(weight: Tensor, spec: TensorSpec, layer: str) -> tuple[Tensor, Grid]:
    """Cut a weight (out, in) into (out, G, g) float32 and find its grid, scale and zero_point (out,
    G, 1)."""
    group = spec.group_for(weight.shape[1], layer)
    rows = to_groups(weight.float(), group or weight.shape[1])
    grid = affine_grid(rows, spec.num_bits, -1, spec.range_rule)
    if not grid.scale.is_meta and not bool(torch.isfinite(grid.scale).all()):
        raise NonFiniteError(f"layer {layer}: weight holds NaN or infinity; repair the checkpoint")
    return rows, grid


class LearnedRounding(nn.Module):
    """A weight while its rounding is learned: codes = floor(w / s) + z + h(alpha)."""

    def __init__(self, rows: Tensor, grid: Grid, num_bits: int, hard: bool) -> None:
        super().__init__()
        self.grid, self.num_bits, self.hard = grid, num_bits, hard
        self.floor = adaround.floor_codes(rows, grid)
        self.alpha = nn.Parameter(adaround.init_alpha(rows, grid))

    def weight(self) -> Tensor:
        """(out, in) float32 weight, differentiable in alpha: rounded by the sign of alpha (`hard`)
        or by the fraction h(alpha)."""
        codes_of = adaround.straight_through_codes if self.hard else adaround.soft_codes
        codes = codes_of(self.floor, self.alpha, self.num_bits)
        return affine_values(codes, self.grid).flatten(1)

    def hard_codes(self) -> Tensor:
        """(out, G, g) integer-valued codes: h rounded to 0 or 1 by the sign of alpha."""
        return adaround.hard_codes(self.floor, self.alpha.detach(), self.num_bits)


class QuantLinear(nn.Module):
    """A Linear with quantized weight and/or input.

    Buffers: `codes` (out, in) uint8, `scale` and `zero_point` (out, G) float32; a weight kept in
    float (spec.weight None) stays a parameter instead. `rounding` exists only during
    reconstruction.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, linear: nn.Linear, spec: LinearSpec, layer: str) -> None:
        super().__init__()
        self.layer, self.spec = layer, spec
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias
        self.input_group = spec.input.group_for(self.in_features, layer) if spec.input else None
        self.rounding: LearnedRounding | None = None
        self._cached_weight: Tensor | None = None
        self.float_weight: Tensor | None = linear.weight.detach()
        if spec.weight is None:
            self.weight = linear.weight
            return
        rows, grid = weight_grid(linear.weight.detach(), spec.weight, layer)
        self.register_buffer("codes", torch.empty(0))
        self.register_buffer("scale", grid.scale.squeeze(-1))
        self.register_buffer("zero_point", grid.zero_point.squeeze(-1))
        self._set_codes(affine_codes(rows, grid, spec.weight.num_bits))

    @property
    def weight_bits(self) -> int | None:
        return self.spec.weight.num_bits if self.spec.weight else None

    @property
    def grid(self) -> Grid:
        """Scale and zero_point as (out, G, 1)."""
        return Grid(self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1))

    @property
    def codes_grouped(self) -> Tensor:
        """uint8 codes as (out, G, g)."""
        return self.codes.unflatten(1, (self.scale.shape[1], -1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and `bfloat16` go through. Scale and zero point give the codes their
        values, so they follow the model to another device but not to another dtype."""
        grid = {
            name: buffer
            for name, buffer in self._buffers.items()
            if name in ("scale", "zero_point")
        }
        super()._apply(fn, recurse)
        for name, before in grid.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _set_codes(self, codes_OGg: Tensor) -> None:
        self.codes = codes_OGg.flatten(1).to(torch.uint8)
        self._cached_weight = None

    def load_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Replace the quantized weight: codes (out, in) uint8, scale and zero_point (out, G)."""
        self.codes, self.scale, self.zero_point = codes, scale, zero_point
        self._cached_weight = None

    def start_rounding(self, *, hard: bool) -> LearnedRounding:
        """Make the rounding of this weight learnable, starting at the float weight."""
        assert self.spec.weight is not None and self.float_weight is not None
        rows = to_groups(self.float_weight.float(), self.codes_grouped.shape[-1])
        self.rounding = LearnedRounding(rows, self.grid, self.spec.weight.num_bits, hard)
        return self.rounding

    def finish_rounding(self) -> None:
        """Take the hard codes and forget the learned state."""
        assert self.rounding is not None
        self._set_codes(self.rounding.hard_codes())
        self.rounding = None

    def drop_float_weight(self) -> None:
        """Let go of the float weight of the source model; no more learning after this."""
        self.float_weight = None

    def dequantized(self) -> Tensor:
        """(out, in) float32 weight from the codes."""
        return affine_values(self.codes_grouped.float(), self.grid).flatten(1)

    def current_weight(self, dtype: torch.dtype) -> Tensor:
        if self.spec.weight is None:
            return self.weight
        if self.rounding is not None:
            return self.rounding.weight().to(dtype)
        cached = self._cached_weight
        if cached is None or cached.dtype != dtype or cached.device != self.codes.device:
            # Kept for later calls, which may want gradients: not an inference tensor.
            with torch.inference_mode(False):
                cached = self._cached_weight = self.dequantized().to(dtype)
        return cached

    def fake_input(self, x: Tensor) -> Tensor:
        """The input on its grid: per token, or per group of channels of a token. Raises
        `NonFiniteError` naming the layer, since a range with NaN or infinity has no grid."""
        spec = self.spec.input
        if spec is None:
            return x
        if not bool(x.isfinite().all()):
            raise NonFiniteError(f"layer {self.layer}: input holds NaN or infinity")
        rows = to_groups(x, self.input_group)
        fake = (
            sign_split_fake(rows, spec.num_bits)
            if spec.type == "sign_split"
            else _affine(rows, spec, -1)
        )
        return from_groups(fake) if self.input_group else fake

    def forward(self, x: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        return F.linear(self.fake_input(x), self.current_weight(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.layer}, in={self.in_features}, out={self.out_features}"


def _affine(x: Tensor, spec: TensorSpec, dims: int | tuple[int, ...]) -> Tensor:
    return affine_fake(x, spec.num_bits, dims, spec.range_rule)


class QuantScores(Scores):
    """q k^T with both sides quantized. Keys per head channel share a range over all tokens of the
    call."""

    def __init__(self, spec: AttentionSpec, layer: str) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer

    def forward(self, q_BHlc: Tensor, k_BHLc: Tensor) -> Tensor:
        query, key = self.spec.query, self.spec.key
        if query is not None:
            q_BHlc = _affine(q_BHlc, query, -1)
        if key is not None:
            k_BHLc = _affine(k_BHLc, key, -2 if key.strategy == "channel" else -1)
        return super().forward(q_BHlc, k_BHLc)


class QuantMix(Mix):
    """p v with p by its probability rule and v per head, shift-and-sum where `theta` is set.

    The order of each key follows from the float attention averaged over the queries of the call,
    before p is quantized (paper section on kernel selection; docs/method.md section 2).
    """

    def __init__(self, spec: AttentionSpec, layer: str) -> None:
        super().__init__()
        self.spec, self.layer = spec, layer
        self.theta: float | None = None

    def forward(self, p_BHlL: Tensor, v_BHLc: Tensor) -> Tensor:
        p_hat, v_hat = p_BHlL, v_BHLc
        if self.spec.value is not None:
            v_hat = self.fake_value(p_BHlL, v_BHLc)
        if self.spec.probability is not None:
            p_hat = probability_fake(p_BHlL, self.spec.probability)
        return super().forward(p_hat, v_hat)

    def fake_value(self, p_BHlL: Tensor, v_BHLc: Tensor) -> Tensor:
        spec = self.spec.value
        assert spec is not None
        if self.theta is None:
            return _affine(v_BHLc, spec, (-2, -1))
        abar_BHL = wide(p_BHlL.detach()).mean(dim=-2)
        order_BHL = orders(abar_BHL, self.theta, self.spec.max_order)
        grid = affine_grid(v_BHLc, spec.num_bits, (-2, -1), spec.range_rule)
        return shift_sum_fake(v_BHLc, grid, order_BHL, spec.num_bits)
