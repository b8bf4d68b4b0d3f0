"""Fake quantizers with their gradients written out, for reconstruction.

Same signatures, the same values to the bit and the same gradients as the plain ones (affine.py,
sign_split.py, log2.py, uniform.py, adaround.py), which say what is computed. Autograd keeps and
passes over a dozen temporaries of each; most cancel. With x^ = (q - z) s and gradient g of x^,

    dx = g m,    ds = sum(g (x^ - m x)) / s,    m = 1 where the code was not clamped

and ds goes on to the extremes that s came from. A log2 rule is p^ = p times a factor that neither
the row maximum nor p moves, so dp = g p^ / p. Second derivatives are not here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varptq.quant import adaround, affine, log2, sign_split, uniform
from varptq.quant.affine import (
    LEAST_SCALE,
    SCALE_FLOOR,
    Dims,
    Grid,
    RangeRule,
    affine_values,
    wide,
)


def _wanted(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def affine_fake(
    x: Tensor, num_bits: int, dims: Dims = -1, range_rule: RangeRule = "with_zero"
) -> Tensor:
    """x on its own grid, as `affine.affine_fake`."""
    if not _wanted(x):
        return affine.affine_fake(x, num_bits, dims, range_rule)
    return _Affine.apply(x, num_bits, dims, range_rule)


def sign_split_fake(x: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """x on its own grid of two sides, as `sign_split.sign_split_fake`."""
    if not _wanted(x):
        return sign_split.sign_split_fake(x, num_bits, dims)
    return _SignSplit.apply(x, num_bits, dims)


def log2_fake(p: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """p as powers of two of its row maximum, as `log2.log2_fake`."""
    if not _wanted(p):
        return log2.log2_fake(p, num_bits, dims)
    return _Log2.apply(p, num_bits, dims)


def uniform_fake(p: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """p on the steps of its rows, as `uniform.uniform_fake`."""
    if not _wanted(p):
        return uniform.uniform_fake(p, num_bits, dims)
    return _Uniform.apply(p, num_bits, dims)


def passed(x: Tensor, values: Tensor) -> Tensor:
    """`values`, same shape and dtype as x; their gradient goes to x as if they were x."""
    return _Passed.apply(x, values) if _wanted(x) else values


def rounded_weight(floor: Tensor, alpha: Tensor, grid: Grid, num_bits: int) -> Tensor:
    """`affine_values` of `adaround.straight_through_codes` on a grid that is not learned."""
    assert not grid.scale.requires_grad
    return _RoundedWeight.apply(floor, alpha, *grid, num_bits)


def _incoming(gradients: tuple[Tensor, ...]) -> Tensor:
    """A fresh copy of the gradient of the output."""
    assert not torch.is_grad_enabled(), "second derivatives of quantizers are not written"
    return gradients[0].to(torch.promote_types(gradients[0].dtype, torch.float32), copy=True)


def _add_to_extreme(dx: Tensor, x: Tensor, extreme: Tensor, gradient: Tensor, dims: Dims) -> None:
    """Add `gradient` of an extreme of x over `dims` to dx in place, shared evenly between ties."""
    at = (x == extreme).to(dx.dtype)
    dx.addcmul_(at, gradient / at.sum(dims, keepdim=True))


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_bits: int, dims: Dims, range_rule: RangeRule) -> Tensor:
        grid = affine.affine_grid(x, num_bits, dims, range_rule)
        out = affine_values(affine.affine_codes(x, grid, num_bits), grid).to(x.dtype)
        ctx.save_for_backward(x, out, *grid)
        ctx.settings = num_bits, dims, range_rule
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        num_bits, dims, range_rule = ctx.settings
        x, out, scale, zero_point = ctx.saved_tensors
        low, high = (wide(f(dims, keepdim=True)) for f in (x.amin, x.amax))
        top, dx, with_zero = 2**num_bits - 1, _incoming(gradients), range_rule == "with_zero"
        # Codes rise with x, so those of the extremes say whether any was clamped: next to never.
        ends = [(end / scale).round() + zero_point for end in (low, high)]
        if bool(((ends[0] < 0) | (ends[1] > top)).any()):
            codes = (x / scale).round_().add_(zero_point)
            error = out * dx
            dx.mul_((codes >= 0) & (codes <= top))
            error.sub_(dx * x)
        else:
            error = (wide(out) - x).mul_(dx)
        step = high.clamp(min=0) - low.clamp(max=0) if with_zero else high - low
        least = LEAST_SCALE if with_zero else SCALE_FLOOR
        dscale = error.sum(dims, keepdim=True) / scale / top * (step / top >= least)
        for extreme, sign, passes in ((low, -1, low <= 0), (high, 1, high >= 0)):
            gradient = sign * dscale * passes if with_zero else sign * dscale
            _add_to_extreme(dx, x, extreme, gradient, dims)
        return dx.to(x.dtype), None, None, None


class _SignSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_bits: int, dims: Dims) -> Tensor:
        out = sign_split.sign_split_fake(x.detach(), num_bits, dims)
        ctx.save_for_backward(x, out)
        ctx.settings = num_bits, dims
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        num_bits, dims = ctx.settings
        x, out = ctx.saved_tensors
        levels, dx = sign_split.sign_split_levels(num_bits), _incoming(gradients)
        # The range of a side is its extreme, so no code is clamped.
        error = (wide(out) - x).mul_(dx)
        whole = error.sum(dims, keepdim=True)
        above = error.mul_(x > 0).sum(dims, keepdim=True)
        low, high = (f(dims, keepdim=True) for f in (x.amin, x.amax))
        for extreme, sign, part in ((low, -1, whole - above), (high, 1, above)):
            scale = wide(extreme) * (sign / levels)
            # A side without values has the least scale, which is nobody's extreme.
            passes = scale >= SCALE_FLOOR
            gradient = torch.where(passes, part / scale.clamp(min=SCALE_FLOOR), 0)
            _add_to_extreme(dx, x, extreme, gradient * (sign / levels), dims)
        return dx.to(x.dtype), None, None


class _Log2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, num_bits: int, dims: Dims) -> Tensor:
        out = log2.log2_fake(p.detach(), num_bits, dims)
        ctx.save_for_backward(p, out)
        ctx.dims = dims
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        p, out = ctx.saved_tensors
        shift = log2.LOG2_SHIFT * uniform.row_max(p, ctx.dims)
        return _incoming(gradients).mul_(out).div_(p + shift).to(p.dtype), None, None


class _Uniform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, num_bits: int, dims: Dims) -> Tensor:
        out = uniform.uniform_fake(p.detach(), num_bits, dims)
        ctx.save_for_backward(p, out)
        ctx.dims = dims
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        p, out = ctx.saved_tensors
        highest, dp = p.amax(ctx.dims, keepdim=True), _incoming(gradients)
        error = (wide(out) - p).mul_(dp).sum(ctx.dims, keepdim=True)
        gradient = error / highest.clamp(min=SCALE_FLOOR) * (highest >= SCALE_FLOOR)
        _add_to_extreme(dp, p, highest, gradient, ctx.dims)
        return dp.to(p.dtype), None, None


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, floor: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int
    ) -> Tensor:
        codes = (alpha >= 0).to(alpha.dtype).add_(floor)
        ctx.save_for_backward(floor, alpha, scale)
        ctx.top = 2**num_bits - 1
        return codes.clamp_(0, ctx.top).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        floor, alpha, scale = ctx.saved_tensors
        h = torch.sigmoid(alpha)
        slope = _incoming(gradients).mul_(scale * (adaround.ZETA - adaround.GAMMA))
        slope.mul_(h).mul_(1 - h)
        h.mul_(adaround.ZETA - adaround.GAMMA).add_(adaround.GAMMA)
        codes = (alpha >= 0).to(alpha.dtype).add_(floor)
        free = (h >= 0) & (h <= 1) & (codes >= 0) & (codes <= ctx.top)
        return None, slope.mul_(free), None, None, None
