"""Modules on integers for the seams of an autoencoder's decoder, the same for every runtime.

    DeferredMapNorm   passes the map on; the convolution's codes are made while the norm is computed
    IntConvolution    codes of the map x packed codes of the weight, then scale and bias
    NormedConvolution a convolution in float and the norm before it, some rows at a time

What is computed is defined by `quant.convolution.QuantConvolution`, which `IntConvolution`
replaces. A runtime without kernels for it (`ImageKernels`) decodes in float on the values of the
weights' codes, and so does every runtime where the config has no codes for a convolution's input.
An encoder stays as it is stored: `QuantConvolution` needs no memory for its values between calls.
Shapes as in models/convolutions.py; NHWC is the layout of the kernels, channels last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.autoencoder import Autoencoder
from varptq.models.convolutions import Convolution, MapNorm, Taps, feeds
from varptq.quant.buffers import TypedBuffers
from varptq.quant.convolution import QuantConvolution
from varptq.quant.find import quant_convolutions
from varptq.runtime.kernels import ImageKernels, Kernels, Map, NormRule, PendingMap
from varptq.runtime.layers import replace_module, tensors_of

# Attribute of a map that an `IntConvolution` made: `Map.found`. Nobody changes such a map in place,
# and whatever is computed from it is another tensor, without the attribute.
FOUND = "varptq_found"
# So much of a map is normed at once for a convolution in float.
PART_ELEMENTS = 2**19


class DeferredMapNorm(TypedBuffers):
    """The norm before an `IntConvolution`, left for that layer to compute."""

    def __init__(self, norm: MapNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, norm.silu
        self.register_buffer("weight", norm.weight.detach().float())
        self.register_buffer("bias", norm.bias.detach().float())

    def forward(self, x_BCHW: Tensor) -> PendingMap:
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return PendingMap(x_BCHW, NormRule(self.groups, weight, bias, self.eps, self.silu))


class IntConvolution(TypedBuffers):
    """A `QuantConvolution` on integers. Its input is a map or a `PendingMap` (B, C, H, W), its
    output is a float32 map, channels last. The packed weight belongs to the kernels."""

    bias: Tensor | None

    def __init__(self, conv: QuantConvolution, kernels: ImageKernels) -> None:
        super().__init__()
        assert conv.weight_scale is not None
        self.layer, self.taps, self.kernels = conv.layer, conv.taps, kernels
        self.packed = kernels.pack_convolution(conv.weight, conv.weight_scale, conv.taps)
        # Also as buffers, so that a state dict holds all that takes part in the result.
        for name, tensor in tensors_of(self.packed).items():
            self.register_buffer(f"packed_{name}", tensor)
        bias = conv.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        names = tensors_of(self.packed)
        self.packed = self.packed._replace(**{n: self._buffers[f"packed_{n}"] for n in names})
        return self

    def forward(self, x: Tensor | PendingMap, skip: Tensor | None = None) -> Tensor:
        x_BCHW, norm = x if isinstance(x, PendingMap) else (x, None)
        read = Map(_channels_last(x_BCHW), getattr(x_BCHW, FOUND, None))
        codes = self.kernels.map_codes(read, norm, self.layer)
        added = None if skip is None else _channels_last(skip)
        made = self.kernels.convolution(codes, self.packed, self.bias, self.taps, added)
        y_BOHW = made.x_NHWC.permute(0, 3, 1, 2)
        setattr(y_BOHW, FOUND, made.found)
        return y_BOHW

    def extra_repr(self) -> str:
        return f"{self.layer}, {self.kernels.name}"


class NormedConvolution(Convolution):
    """A convolution in float of a `PendingMap`, whose norm is computed some rows at a time: as a
    whole it would be one more map of the decoder's largest size.

    It has few channels out. So each pixel is multiplied with all taps at once, a matrix product,
    and what it adds to its neighbours is added where they lie: no row is normed twice, and the
    libraries' convolutions take three times as long for three channels."""

    kernels: ImageKernels

    @classmethod
    def of(cls, conv: Convolution, kernels: ImageKernels) -> Self:
        """The same convolution, which keeps the side of its input."""
        with torch.device("meta"):
            found = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.taps)
        found.weight, found.bias, found.kernels = conv.weight, conv.bias, kernels
        return found.eval()

    def forward(self, input: Any, skip: Tensor | None = None) -> Tensor:
        """As `Convolution`, of a `PendingMap`."""
        x_BHWC, norm = _channels_last(input.x_BCHW), input.norm
        read = Map(x_BHWC, getattr(input.x_BCHW, FOUND, None))
        gain_BC, shift_BC = self.kernels.affine(read, norm)
        batch, height, width, channels = x_BHWC.shape
        rows = min(max(1, PART_ELEMENTS // (width * channels)), height)
        # (k k O, C)
        taps_TC = self.weight.permute(2, 3, 0, 1).flatten(0, 2).contiguous()
        whole = x_BHWC.new_zeros((batch, self.out_channels, height, width))
        if self.bias is not None:
            whole += self.bias[:, None, None]
        # One buffer for all parts: what each of them would leave lies between results that stay.
        buffer_PC = x_BHWC.new_empty(rows * width, channels)
        for image, gain_C, shift_C, x_HWC in zip(whole, gain_BC, shift_BC, x_BHWC, strict=True):
            for start in range(0, height, rows):
                part_PC = x_HWC[start : start + rows].view(-1, channels)
                y_PC = torch.mul(part_PC, gain_C, out=buffer_PC[: len(part_PC)]).add_(shift_C)
                y_PC = F.silu(y_PC, inplace=True) if norm.silu else y_PC
                self._add(image, (taps_TC @ y_PC.t()).unflatten(1, (-1, width)), start)
        return whole if skip is None else skip + whole

    def _add(self, image_OHW: Tensor, products_ThW: Tensor, start: int) -> None:
        """What rows `start`.. add to the image: products with all taps (k k O, h, W)."""
        side, count = self.kernel_size[0], products_ThW.shape[1]
        height, width = image_OHW.shape[1:]
        for place, tap_OhW in enumerate(products_ThW.unflatten(0, (side * side, -1))):
            down, right = start + side // 2 - place // side, side // 2 - place % side
            top, left = max(down, 0), max(right, 0)
            bottom, end = min(down + count, height), min(right + width, width)
            into = image_OHW[:, top:bottom, left:end]
            into += tap_OhW[:, top - down : bottom - down, left - right : end - right]


def _channels_last(x_BCHW: Tensor) -> Tensor:
    """(B, H, W, C) float32, contiguous."""
    return x_BCHW.permute(0, 2, 3, 1).float().contiguous()


def decode_on(vae: Autoencoder, kernels: Kernels) -> None:
    """Replace, in place, what only decoding needs of the quantized convolutions of `vae`."""
    decoding = tuple(f"{name}." for name in vae.DECODING)
    for layer, conv in quant_convolutions(vae).items():
        if not layer.startswith(decoding):
            continue
        if (
            conv.on_codes
            and isinstance(kernels, ImageKernels)
            and kernels.takes_convolution(conv.weight, conv.taps)
        ):
            replace_module(vae, layer, IntConvolution(conv, kernels))
        else:
            replace_module(vae, layer, _float_convolution(conv))
    integers = decodes_on_integers(vae)
    for layer, source in feeds(vae).items():
        conv = vae.get_submodule(layer)
        if integers and layer.startswith(decoding) and _keeps_side(conv):
            assert isinstance(kernels, ImageKernels)
            conv = NormedConvolution.of(cast(Convolution, conv), kernels)
            replace_module(vae, layer, conv)
        if isinstance(conv, IntConvolution | NormedConvolution):
            replace_module(vae, source, DeferredMapNorm(cast(MapNorm, vae.get_submodule(source))))


def _keeps_side(module: nn.Module) -> bool:
    """Whether this is a convolution in float, of plain 3x3 taps."""
    return type(module) is Convolution and module.taps == Taps(pads=(1, 1, 1, 1))


def _float_convolution(conv: QuantConvolution) -> Convolution:
    """The convolution with the values of the codes, in float32."""
    channels_out, channels_in, kernel, _ = conv.weight.shape
    with torch.device("meta"):
        found = Convolution(channels_in, channels_out, kernel, conv.taps)
    found.weight = nn.Parameter(conv.values(torch.float32), requires_grad=False)
    found.bias = conv.bias
    return found.eval()


def decodes_on_integers(vae: Autoencoder) -> bool:
    """Whether some convolution of the decoder computes on integers."""
    parts = (vae.get_submodule(name) for name in vae.DECODING)
    return any(isinstance(module, IntConvolution) for part in parts for module in part.modules())
