"""Convolutions on integers in plain torch, for runtime "reference"; native ones equal them.

    y[n, o] = float(P') * (t[n] s[o]) + b[o],    P' = sum of (q - z) c

P' is exact and rounded once, to float32; then come a product of scales, a product and a sum, each
rounded, none fused. Maps are channels last: NHWC.

    v = x a + b,    a = weight / sqrt(variance + eps),    b = bias - mean a       by channel
    SiLU: v / (1 + e^-v)

Mean and variance come from sums in double, which leave no trace of their order when they are
rounded, unless a group's mean is thousands of times its deviation; all else is float32, each
operation rounded, e^x the polynomial of the native core (src/lanes/vmath.h), whose steps are fused.
The range of SiLU is what the ends of v leave possible: it falls to its lowest point and rises from
there, so nothing else has to be known of a map before it is coded.

The token map is a convolution in float, and its last bits move the codes of all that follow. So its
sums have the order of the native core, too (`OrderedPhi`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.convolutions import Taps
from varptq.models.seams import RESIDUAL_RATIO
from varptq.quant.affine import check_finite
from varptq.quant.convolution import MapCodes, codes_on, image_grid
from varptq.runtime.kernels import NormRule

# Where SiLU is lowest; below NOTHING it is nothing beside any step.
LOWEST, NOTHING = -1.2784645, -87.0
# Adding 1.5 2^23 rounds to an integer and leaves it in the low bits.
SHIFT = 12582912.0
# The bits of a double that a float has not, and those of one halfway between two floats.
BELOW_FLOAT, BETWEEN_FLOATS = 2**29 - 1, 2**28
PART = 2**16
# 2^f for |f| <= 1/2, the highest power first.
POWERS = ("0x1.5bba18p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1")


def fused(a: Tensor, b: Tensor, c: float) -> Tensor:
    """a b + c of normal float32 numbers, rounded once. The product is exact in double. The sum is
    not, but a second rounding tells only where the first one ended between two floats."""
    product = a.double() * b.double()
    total = product + c
    bits = total.view(torch.int64)
    between = bits & BELOW_FLOAT == BETWEEN_FLOATS
    if between.any():
        added = total - product
        lost = (product - (total - added)) + (c - added)
        toward = torch.where((lost > 0) == (total > 0), 1, -1)
        bits = torch.where(between & (lost != 0), bits + toward, bits)
    return bits.view(torch.float64).float()


def exp_within(x: Tensor) -> Tensor:
    """e^x of float32 for -87 <= x <= 88, to 2e-7 + 8e-8 |x|."""
    # In parts that caches hold: a map of doubles would be fresh memory at every step.
    return torch.cat([_exp_within(part) for part in x.flatten().split(PART)]).view_as(x)


def _exp_within(x: Tensor) -> Tensor:
    y = x * 1.44269504
    shifted = y + SHIFT
    f = y - (shifted - SHIFT)
    p = torch.full_like(x, float.fromhex(POWERS[0]))
    for power in (*map(float.fromhex, POWERS[1:]), 1.0):
        p = fused(p, f, power)
    return (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


def silu(x: Tensor) -> Tensor:
    within = x.clamp(min=NOTHING)
    return within / (1.0 + exp_within((-within).clamp(min=NOTHING)))


def affine(x_NHWC: Tensor, norm: NormRule) -> tuple[Tensor, Tensor]:
    """`ImageKernels.affine`, its statistics in double, rounded once."""
    wide = x_NHWC.double()
    return affine_of(torch.stack((wide.sum((1, 2)), (wide * wide).sum((1, 2)))), x_NHWC, norm)


def affine_of(sums_2NC: Tensor, x_NHWC: Tensor, norm: NormRule) -> tuple[Tensor, Tensor]:
    """The same from the sums of each channel's values and squares, float64."""
    width = x_NHWC.shape[-1] // norm.groups
    count = x_NHWC.shape[1] * x_NHWC.shape[2] * width
    mean_NG, square_NG = sums_2NC.unflatten(-1, (norm.groups, width)).sum(-1) / count
    variance_NG = (square_NG - mean_NG * mean_NG).clamp(min=0.0)
    rate_NG = (1.0 / (variance_NG + norm.eps).sqrt()).float()
    gain_NC = norm.weight_C * rate_NG.repeat_interleave(width, -1)
    return gain_NC, norm.bias_C - mean_NG.float().repeat_interleave(width, -1) * gain_NC


def norm_codes(x_NHWC: Tensor, norm: NormRule, layer: str) -> MapCodes:
    """Codes (N, H, W, C) of the norm of maps, one range per image. Raises `NonFiniteError`."""
    check_finite(x_NHWC, layer)
    gain_NC, shift_NC = affine(x_NHWC, norm)
    v = x_NHWC * gain_NC[:, None, None] + shift_NC[:, None, None]
    if not norm.silu:
        return codes_on(v, image_grid(v))
    low, high = v.amin((1, 2, 3), keepdim=True), v.amax((1, 2, 3), keepdim=True)
    lowest = torch.full_like(low, LOWEST)
    grid = image_grid(silu(torch.cat((torch.minimum(lowest.maximum(low), high), high), -1)))
    return codes_on(silu(v), grid)


def products(codes_NHWC: Tensor, zero_point_N: Tensor, weight_OIkk: Tensor, taps: Taps) -> Tensor:
    """P' (N, H', W', O), exact."""
    # Integers of float64 are exact up to 2^53, and torch has no convolution of integers.
    centred = codes_NHWC.permute(0, 3, 1, 2).double() - zero_point_N.view(-1, 1, 1, 1)
    return taps.convolve(centred, weight_OIkk.double(), None).permute(0, 2, 3, 1)


def scaled(
    products_NHWO: Tensor, scale_N: Tensor, scale_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    """float32 (N, H', W', O), contiguous."""
    y_NHWO = products_NHWO.float() * (scale_N.view(-1, 1, 1, 1) * scale_O)
    return y_NHWO.contiguous() if bias_O is None else (y_NHWO + bias_O).contiguous()


class OrderedPhi(nn.Module):
    """phi(h) of the token map. One sum per output, each product and each sum rounded: bias, then
    input channels, kernel rows and kernel columns ascending."""

    def __init__(self, phi: nn.Conv2d) -> None:
        super().__init__()
        assert phi.bias is not None
        self.weight, self.bias, self.reach = phi.weight, phi.bias, phi.kernel_size[0] // 2

    def forward(self, h_BCPP: Tensor) -> Tensor:
        height, width = h_BCPP.shape[2:]
        around = F.pad(h_BCPP, (self.reach,) * 4)
        sums = self.bias.view(-1, 1, 1).expand_as(h_BCPP)
        for channel, rows, columns in torch.ones_like(self.weight[0]).nonzero().tolist():
            h = around[:, channel, None, rows : rows + height, columns : columns + width]
            sums = sums + self.weight[:, channel, rows, columns, None, None] * h
        return (1 - RESIDUAL_RATIO) * h_BCPP + RESIDUAL_RATIO * sums
