"""Convolutions of an autoencoder with 8-bit weights and inputs: what stands in their seams.

    w^[o] = c[o] s[o]             s[o] = max |w[o]| / 127,    c = round(w / s)    in -127 .. 127
    x^[n] = (q[n] - z[n]) t[n]    one range per image n, and it contains 0 (affine.py)
    y[n, o] = sum of (q - z) c, which is an integer, times t[n] s[o], plus b[o]

An image's codes are functions of that image alone. Zeros around a map are the code z, and an
upsampled map has the codes of the map, so both may be laid around codes as well. Codes of weights
are symmetric: the zero point of the input then costs one number per output channel.

Weights in bfloat16 are the other thing that stands here: two bytes in place of four, computed in
the dtype of the map. Shapes as in models/convolutions.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.models.convolutions import Convolution
from varptq.quant.affine import (
    EMPTY_SCALE,
    LEAST_SCALE,
    Grid,
    affine_codes,
    affine_grid,
    affine_values,
    check_finite,
    integer_codes,
)
from varptq.quant.buffers import TypedBuffers
from varptq.quant.config import Precision

NUM_BITS = 8
LARGEST = 127


class MapCodes(NamedTuple):
    """Codes of maps (N, ..) uint8, their layout that of the maps; scale (N,) float32 and zero_point
    (N,) int32, which is a code."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def channel_scale(weight_OIkk: Tensor) -> Tensor:
    """(O,) float32 steps; a channel of zeros has one, too."""
    scale_O = weight_OIkk.float().abs().amax((1, 2, 3)) / LARGEST
    return torch.where(scale_O >= LEAST_SCALE, scale_O, EMPTY_SCALE)


def weight_codes(weight_OIkk: Tensor, scale_O: Tensor) -> Tensor:
    """int8 codes of the same shape."""
    steps = (weight_OIkk.float() / scale_O.view(-1, 1, 1, 1)).round_()
    return integer_codes(steps.clamp_(-LARGEST, LARGEST), signed=True)


def weight_values(codes_OIkk: Tensor, scale_O: Tensor) -> Tensor:
    """float32 values of int8 codes."""
    return codes_OIkk.float().mul_(scale_O.view(-1, 1, 1, 1))


def image_grid(x: Tensor) -> Grid:
    """Of maps (N, ..): scale and zero point (N, 1, ..), one range per image, zero in it."""
    return affine_grid(x, NUM_BITS, tuple(range(1, x.dim())), "with_zero")


def map_codes(x: Tensor, layer: str) -> MapCodes:
    """Codes of maps (N, ..) of any layout, the input of `layer`. Raises `NonFiniteError`."""
    check_finite(x, layer)
    return codes_on(x, image_grid(x))


def codes_on(x: Tensor, grid: Grid) -> MapCodes:
    """Codes of finite maps on the grids of `image_grid`."""
    codes = integer_codes(affine_codes(x, grid, NUM_BITS))
    return MapCodes(codes, grid.scale.flatten(), grid.zero_point.flatten().int())


class QuantConvolution(TypedBuffers):
    """A `Convolution` whose weight is stored as codes, or in bfloat16; simulated: it computes in
    float on their values.

    Buffers: `weight` (O, I, k, k) int8 with `weight_scale` (O,) float32, or bfloat16. on_codes:
    the input is rounded to codes of its image, too.
    """

    weight: Tensor
    weight_scale: Tensor | None

    def __init__(self, conv: Convolution, precision: Precision, layer: str) -> None:
        super().__init__()
        self.layer, self.precision, self.taps = layer, precision, conv.taps
        self.on_codes = precision == "int8"
        self.bias, float_weight = conv.bias, conv.weight.detach()
        shape, device = tuple(float_weight.shape), float_weight.device
        dtype = torch.int8 if precision == "int8" else torch.bfloat16
        scale = torch.empty(shape[:1], dtype=torch.float32, device=device)
        self.register_buffer("weight", torch.empty(shape, dtype=dtype, device=device))
        self.register_buffer("weight_scale", scale if precision == "int8" else None)
        if not float_weight.is_meta:
            self._round(float_weight)

    def _round(self, weight: Tensor) -> None:
        if not bool(weight.isfinite().all()):
            raise NonFiniteError(
                f"layer {self.layer}: weight holds NaN or infinity; repair the checkpoint"
            )
        if self.weight_scale is None:
            self.weight = weight.bfloat16()
        else:
            self.weight_scale = channel_scale(weight)
            self.weight = weight_codes(weight, self.weight_scale)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I, k, k)."""
        if self.weight_scale is None:
            return self.weight.to(dtype)
        return weight_values(self.weight, self.weight_scale).to(dtype)

    def fake_input(self, x: Tensor) -> Tensor:
        """Maps on the grids of their images, dtype as x. Raises `NonFiniteError`."""
        check_finite(x, self.layer)
        grid = image_grid(x)
        return affine_values(affine_codes(x, grid, NUM_BITS), grid).to(x.dtype)

    def forward(self, x_BCHW: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.on_codes:
            x_BCHW = self.fake_input(x_BCHW)
        y = self.taps.convolve(x_BCHW, self.values(x_BCHW.dtype), self.bias)
        return y if skip is None else skip + y

    def extra_repr(self) -> str:
        return f"{self.layer}, {tuple(self.weight.shape)}, {self.precision}"
