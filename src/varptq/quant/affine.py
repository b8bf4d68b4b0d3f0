"""The uniform asymmetric quantizer: weights, Linear inputs, q, k and v (method: section 2).

    s = (max - min) / (2^b - 1)                 z = -round(min / s)
    q = clamp(round(x / s) + z, 0, 2^b - 1)     x^ = (q - z) s          round half to even

Under "with_zero" s has no floor: 2^k x gives the codes of x, whatever the units of a tensor are.
Only where s is no normal float, so for a slice of zeros, 2^-64 stands in. The rules of the released
code keep its floor, s >= 1e-6.

Pure functions on tensors; the extent of one scale is the set of dimensions the range is taken
over. Gradients flow through everything, rounding passes them straight: a caller who wants a fixed
grid detaches it. Inputs narrower than float32 are quantized in float32. Which tensor gets which
quantizer is decided in config.py, not here; what a quantizer is asked for, in quantizers.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.models import finite

# Of the released code's rules, and of quantizers whose input has units of its own.
SCALE_FLOOR = 1e-6
# The smallest normal float32; and a step for slices with less to represent, which is far below
# every other and still gives normal numbers when multiplied by one.
LEAST_SCALE, EMPTY_SCALE = 2.0**-126, 2.0**-64
Dims = int | tuple[int, ...]
# What is taken for the range of a slice; `TensorSpec` says what each does.
RangeRule = Literal["with_zero", "min_max", "min_max_clamped"]


class Grid(NamedTuple):
    """scale and integer-valued zero_point, float32 or wider, that broadcast to the tensor."""

    scale: Tensor
    zero_point: Tensor


def wide(x: Tensor) -> Tensor:
    """x in the dtype quantizers compute in: float32, or float64 if x has it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_finite(x: Tensor, layer: str) -> None:
    """Raises `NonFiniteError` naming the layer, since a range with NaN or infinity has no grid.
    Inside `torch.compile`, whose graphs cannot branch on values, torch's RuntimeError says so; what
    is recorded says it when it has run (finite.py)."""
    message = f"layer {layer}: input holds NaN or infinity"
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(x.isfinite().all(), message)
    elif finite.are_kept():
        finite.require(x.isfinite().all(), message)
    # Either shows in the sum, which is one pass; a sum may overflow without them.
    elif not (bool(x.detach().sum().isfinite()) or bool(x.isfinite().all())):
        raise NonFiniteError(message)


def round_ste(x: Tensor) -> Tensor:
    """round(x), half to even; the gradient passes as if it were x."""
    if not x.requires_grad:
        return x.round()
    return x + (x.round() - x).detach()


def round_ste_(x: Tensor) -> Tensor:
    """`round_ste` of a tensor nobody else holds: overwrites it where no gradient is wanted.

    Quantizers run on every activation of a simulated model, and new temporaries cost more there
    than the arithmetic. So they work in place on what they made themselves; autograd keeps the
    operands it needs.
    """
    return round_ste(x) if x.requires_grad else x.round_()


def affine_grid(
    x: Tensor, num_bits: int, dims: Dims = -1, range_rule: RangeRule = "with_zero"
) -> Grid:
    """One scale and zero point per slice of x over `dims`, which stay as dimensions of size 1.

    The scale is positive and a normal float32. Zero points lie in [0, 2^b - 1] except under
    "min_max", where a slice of one sign puts it outside; constants come back to about 1e-6 there,
    up to 3e32; above, where the reference code gives NaN, the value saturates.
    """
    low, high = wide(x.amin(dims, keepdim=True)), wide(x.amax(dims, keepdim=True))
    if range_rule == "with_zero":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    top = 2**num_bits - 1
    # Halves of both sides give the same float, and do not overflow where max - min would.
    scale = (0.5 * high - 0.5 * low) / (0.5 * top)
    if range_rule == "with_zero":
        scale = torch.where(scale >= LEAST_SCALE, scale, EMPTY_SCALE)
    else:
        scale = scale.clamp(min=SCALE_FLOOR)
    limit = torch.finfo(scale.dtype).max
    bounds = (-limit, limit) if range_rule == "min_max" else (0, top)
    return Grid(scale, (-(low / scale).round()).clamp(*bounds))


def affine_codes(x: Tensor, grid: Grid, num_bits: int) -> Tensor:
    """Codes of x, integer-valued floats in [0, 2^b - 1], in the dtype of the grid."""
    steps = round_ste_(x.to(grid.scale.dtype) / grid.scale)
    return steps.add_(grid.zero_point).clamp_(0, 2**num_bits - 1)


def affine_values(codes: Tensor, grid: Grid) -> Tensor:
    """The real values of codes (float or integer dtype), in the dtype of the grid."""
    return codes.sub(grid.zero_point).mul_(grid.scale)


def affine_fake(
    x: Tensor, num_bits: int, dims: Dims = -1, range_rule: RangeRule = "with_zero"
) -> Tensor:
    """x on its own grid, same shape and dtype."""
    grid = affine_grid(x, num_bits, dims, range_rule)
    return affine_values(affine_codes(x, grid, num_bits), grid).to(x.dtype)


def to_groups(x: Tensor, group_size: int | None) -> Tensor:
    """Cut the last axis of x (..., n) into (..., G, group_size); None leaves x as it is.

    `group_size` must divide n: `TensorSpec.group_for` sees to that.
    """
    return x if group_size is None else x.unflatten(-1, (-1, group_size))


def from_groups(x: Tensor) -> Tensor:
    """Undo `to_groups` with a size: (..., G, group_size) to (..., n)."""
    return x.flatten(-2)


def integer_codes(codes: Tensor, *, signed: bool = False) -> Tensor:
    """Integer-valued float codes as uint8, or int8 where they are signed."""
    return codes.detach().to(torch.int8 if signed else torch.uint8)
