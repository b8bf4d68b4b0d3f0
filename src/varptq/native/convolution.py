"""Convolutions on codes on the native core (src/convolution/).

    found = map_codes(x_NHWC, norm=None, silu=False, moments=None) -> Codes
    weight = pack(codes, scale) -> PackedKernel
    y = convolution(found, weight, bias, stride=1, padding=(1, 1, 1, 1), upsample=False,
                    residual=None, moments=None) -> (N, Ho, Wo, O) float32

Codes have 8 bits and a range per image, weights 8 bits and a scale per output, without zero point.
Nothing is materialized: padding is a border of the map of codes, strides and upsampling are where a
tap is read. Moments, which a norm needs of its input, can come from the convolution that makes it.
Results do not depend on batch size, batch split, threads (torch's) or instruction set.

Shapes: N images, H and W sides, C channels in, O out, G groups, P panels of 64 outputs.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_double, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.errors import InputError, NonFiniteError
from varptq.native.binding import call, library
from varptq.native.linear import PANEL, aligned_bytes
from varptq.native.pointers import dense, pointer
from varptq.native.room import Room

BORDER, FOUR = 1, 4
MOST_TAPS, MOST_STRIDE, MOST_INPUTS = 3, 2, 65536
Padding = tuple[int, int, int, int]


class MomentsArgs(ctypes.Structure):
    """vq_moments of src/convolution/convolution.h."""

    _fields_ = (("sum", c_void_p), ("square", c_void_p), ("low", c_void_p), ("high", c_void_p))


class PackKernelArgs(ctypes.Structure):
    """vq_pack_kernel_args of src/convolution/convolution.h, field by field in the same order."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("kernel_height", c_int64),
        ("kernel_width", c_int64),
        ("codes", c_void_p),
        ("packed", c_void_p),
        ("panel_sum", c_void_p),
        ("threads", c_int32),
    )


class ConvolutionArgs(ctypes.Structure):
    """vq_convolution_args of src/convolution/convolution.h, field by field in the same order."""

    _fields_ = (
        ("images", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kernel_height", c_int64),
        ("kernel_width", c_int64),
        ("stride", c_int64),
        ("left", c_int64),
        ("right", c_int64),
        ("top", c_int64),
        ("bottom", c_int64),
        ("upsample", c_int32),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("packed", c_void_p),
        ("panel_sum", c_void_p),
        ("panel_scale", c_void_p),
        ("panel_bias", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("moments", MomentsArgs),
        ("threads", c_int32),
    )


class MapCodesArgs(ctypes.Structure):
    """vq_map_codes_args of src/convolution/convolution.h, field by field in the same order."""

    _fields_ = (
        ("images", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("channels", c_int64),
        ("x", c_void_p),
        ("moments", MomentsArgs),
        ("has_moments", c_int32),
        ("groups", c_int64),
        ("gain", c_void_p),
        ("shift", c_void_p),
        ("eps", c_double),
        ("silu", c_int32),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("threads", c_int32),
    )


class Moments(NamedTuple):
    """Of a map, by image and channel: sums (2, N, C) float64 of values and squares, ends (2, N, C)
    float32, smallest and largest."""

    sums: Tensor
    ends: Tensor

    def arguments(self, images: int, channels: int) -> MomentsArgs:
        a, shape = MomentsArgs(), (2, images, channels)
        a.sum = pointer(self.sums, "moments", torch.float64, *shape)
        a.low = pointer(self.ends, "moments", torch.float32, *shape)
        a.square, a.high = self.sums[1].data_ptr(), self.ends[1].data_ptr()
        return a


def new_moments(images: int, channels: int) -> Moments:
    """Moments to be filled by the convolution that is given them."""
    shape = (2, images, channels)
    return Moments(
        torch.empty(shape, dtype=torch.float64, device="cpu"),
        torch.empty(shape, dtype=torch.float32, device="cpu"),
    )


class Norm(NamedTuple):
    """GroupNorm: groups, weight and bias (C,), eps."""

    groups: int
    weight: Tensor
    bias: Tensor
    eps: float = 1e-6


class Codes(NamedTuple):
    """A map of codes: `data` uint8 in the kernels' layout, scale (N,) float32, zero_point (N,)
    int32; `shape` (N, H, W, C)."""

    data: Tensor
    scale: Tensor
    zero_point: Tensor
    shape: tuple[int, int, int, int]

    @property
    def plain(self) -> Tensor:
        """(N, H, W, C) uint8, without border and padding."""
        n, h, w, c = self.shape
        sides = h + 2 * BORDER, w + 2 * BORDER
        whole = self.data[: n * sides[0] * sides[1] * _channel_bytes(c)].view(n, *sides, -1)
        return whole[:, BORDER:-BORDER, BORDER:-BORDER, :c]


class PackedKernel(NamedTuple):
    """A weight in the kernels' layout, its sums (P, 64) int32 and scale (P, 64) float32; `shape`
    (O, C, Hk, Wk)."""

    packed: Tensor
    sums: Tensor
    scale: Tensor
    shape: tuple[int, int, int, int]


def _channel_bytes(channels: int) -> int:
    return -(-channels // FOUR) * FOUR


def fits(shape: tuple[int, ...], stride: int, padding: Padding) -> bool:
    """Whether the kernels compute such a convolution, weights (O, C, Hk, Wk): sides up to 3,
    strides up to 2, padding up to 1, up to 65536 inputs an output, whose products fit 32 bits."""
    sides = shape[2:]
    return (
        max(sides) <= MOST_TAPS
        and stride <= MOST_STRIDE
        and max(padding) <= BORDER
        and math.prod(shape[1:]) <= MOST_INPUTS
    )


def pack(codes: Tensor, scale_O: Tensor) -> PackedKernel:
    """codes (O, C, Hk, Wk) int8, scale (O,). Sizes are those that `fits` lets through."""
    outputs, inputs, height, width = codes.shape
    codes, panels = codes.contiguous(), -(-outputs // PANEL)
    packed = aligned_bytes(library().vq_kernel_bytes(outputs, inputs, height, width))
    sums = torch.empty((panels, PANEL), dtype=torch.int32, device="cpu")
    a = PackKernelArgs(outputs=outputs, inputs=inputs, kernel_height=height, kernel_width=width)
    a.codes = pointer(codes, "weight codes", torch.int8, outputs, inputs, height, width)
    a.packed, a.panel_sum = packed.data_ptr(), sums.data_ptr()
    a.threads = torch.get_num_threads()
    call("vq_pack_kernel", a)
    return PackedKernel(packed, sums, _panels(scale_O, outputs), (outputs, inputs, height, width))


def _panels(values_O: Tensor | None, outputs: int) -> Tensor:
    """One float32 per output by panels (P, 64), zeros for None and behind the last."""
    panels = -(-outputs // PANEL)
    if values_O is None:
        return torch.zeros((panels, PANEL), dtype=torch.float32, device="cpu")
    flat = dense(values_O, "scale or bias of a convolution", outputs)
    return F.pad(flat, (0, panels * PANEL - outputs)).view(panels, PANEL)


def map_codes(
    x_NHWC: Tensor,
    norm: Norm | None = None,
    *,
    silu: bool = False,
    moments: Moments | None = None,
    room: Room | None = None,
    layer: str = "",
) -> Codes:
    """Codes of x (N, H, W, C) float32, or of its norm, or of SiLU of that, per image.

    moments: those of x, where its producer computed them; without them x is read twice. Statistics
    are sums in double, rounded once. Codes lie in `room`, if there is one. Raises
    `NonFiniteError` naming `layer`."""
    images, height, width, channels = x_NHWC.shape
    x = dense(x_NHWC, "map", images, height, width, channels)
    size = library().vq_map_bytes(images, height, width, channels)
    data = (room or Room()).empty((size,), torch.uint8)
    scale = torch.empty(images, dtype=torch.float32, device="cpu")
    zero_point = torch.empty(images, dtype=torch.int32, device="cpu")
    a = MapCodesArgs(images=images, height=height, width=width, channels=channels, silu=silu)
    a.x = x.data_ptr()
    if moments is not None:
        a.moments, a.has_moments = moments.arguments(images, channels), True
    # Held until the call is over: the pointers keep nothing alive.
    kept: list[Tensor] = []
    if norm is not None:
        if channels % norm.groups:
            raise InputError(
                f"norm of a map: {channels} channels, expected a multiple of {norm.groups}"
            )
        kept = [dense(t, "norm of a map", channels) for t in (norm.weight, norm.bias)]
        a.groups, a.eps = norm.groups, norm.eps
        a.gain, a.shift = (t.data_ptr() for t in kept)
    a.codes, a.scale, a.zero_point = data.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
    a.threads = torch.get_num_threads()
    if not call("vq_map_codes", a):
        raise NonFiniteError(f"layer {layer}: input holds NaN or infinity")
    return Codes(data, scale, zero_point, (images, height, width, channels))


def convolution(
    codes: Codes,
    weight: PackedKernel,
    bias_O: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    upsample: bool = False,
    residual: Tensor | None = None,
    in_place: bool = False,
    moments: Moments | None = None,
    room: Room | None = None,
) -> Tensor:
    """float32 (N, Ho, Wo, O): float(P') (scale_N scale_O) + bias + residual, each rounded, P' the
    exact sum of (code - zero point) weight.

    padding: left, right, top and bottom, 0 or 1, with the value 0. upsample: nearest, to twice the
    sides, before padding. residual (N, Ho, Wo, O) float32, which with `in_place` becomes the
    result. moments: `new_moments`, filled with those of the result. A new result lies in `room`, if
    there is one."""
    (images, height, width, inputs), (outputs, _, *kernel) = codes.shape, weight.shape
    if inputs != weight.shape[1]:
        raise InputError(f"convolution: a map of {inputs} channels, expected {weight.shape[1]}")
    left, right, top, bottom = padding
    a = ConvolutionArgs(images=images, height=height, width=width, inputs=inputs, outputs=outputs)
    a.kernel_height, a.kernel_width = kernel
    a.stride, a.upsample = stride, upsample
    a.left, a.right, a.top, a.bottom = padding
    shape = (
        images,
        (height * (1 + upsample) + top + bottom - kernel[0]) // stride + 1,
        (width * (1 + upsample) + left + right - kernel[1]) // stride + 1,
        outputs,
    )
    bias = _panels(bias_O, outputs)
    if residual is not None:
        a.residual = pointer(residual, "residual of a convolution", torch.float32, *shape)
    y = residual if in_place and residual is not None else (room or Room()).empty(shape)
    size = library().vq_map_bytes(images, height, width, inputs)
    a.codes = pointer(codes.data, "codes", torch.uint8, size)
    a.scale = pointer(codes.scale, "scale", torch.float32, images)
    a.zero_point = pointer(codes.zero_point, "zero point", torch.int32, images)
    size = library().vq_kernel_bytes(outputs, inputs, *kernel)
    a.packed = pointer(weight.packed, "weight", torch.uint8, size)
    a.panel_sum = pointer(weight.sums, "sums of a weight", torch.int32, *bias.shape)
    a.panel_scale = pointer(weight.scale, "scale of a weight", torch.float32, *bias.shape)
    a.panel_bias, a.y = bias.data_ptr(), y.data_ptr()
    if moments is not None:
        a.moments = moments.arguments(images, outputs)
    a.threads = torch.get_num_threads()
    call("vq_convolution", a)
    return y
