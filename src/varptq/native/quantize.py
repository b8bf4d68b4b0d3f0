"""Inputs of Linear layers to codes on the native core (src/quantize/).

    rows = quantize(x, num_bits=8, row_group=None, weight_group=None, sign_split=False,
                    codebook=None, norm=None, gelu=False, means=None, mean_rows=None,
                    hadamard=None, layer="") -> Rows

The definitions are those of varptq.quant (affine, codebook, sign_split, transforms), to the bit.
`row_group` is the activation group in channels (None: one scale per row), `weight_group` that of
the weight that the rows will meet: codes are laid out by segments, the finer of both groups, each
padded to a multiple of 64 channels. Results do not depend on threads, which are torch's. Shapes: M
rows, K inputs, Ga groups of activations, S segments, Lp their padded length.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from varptq.errors import InputError, NonFiniteError
from varptq.native.binding import call
from varptq.native.pointers import TYPES, per_token, pointer, row_numbers

_NO_PROLOGUE, _NORM, _GELU = 0, 1, 2
MOST_ENTRIES = 32


class CodebookArgs(ctypes.Structure):
    """vq_codebook of src/varptq.h."""

    _fields_ = (("entries", c_float * MOST_ENTRIES), ("count", c_int32), ("reach", c_float))


class Codebook(NamedTuple):
    """The positive half of a codebook, up to 127, and the scale of a slice over its deviation
    (varptq.quant.codebook)."""

    entries: tuple[int, ...]
    reach: float

    def arguments(self) -> CodebookArgs:
        numbers = (c_float * MOST_ENTRIES)(*self.entries)
        return CodebookArgs(numbers, len(self.entries), self.reach)


class QuantizeArgs(ctypes.Structure):
    """vq_quantize_args of src/quantize/quantize.h, field by field in the same order."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("x", c_void_p),
        ("row_stride", c_int64),
        ("x_type", c_int32),
        ("prologue", c_int32),
        ("gain", c_void_p),
        ("shift", c_void_p),
        ("modulation_stride", c_int64),
        ("rows_per_image", c_int64),
        ("eps", c_float),
        ("hadamard", c_int32),
        ("means", c_void_p),
        ("mean_row", c_void_p),
        ("num_bits", c_int32),
        ("sign_split", c_int32),
        ("codebook", CodebookArgs),
        ("group", c_int64),
        ("segment", c_int64),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("sum", c_void_p),
        ("values", c_void_p),
        ("threads", c_int32),
    )


class Norm(NamedTuple):
    """Prologue LayerNorm(x) (1 + gain) + shift: gain and shift (B, K) float32, or (K,) for all."""

    gain: Tensor
    shift: Tensor
    eps: float = 1e-6


class Rows(NamedTuple):
    """Quantized rows; with `pairs`, rows 2m and 2m + 1 are the signs of row m.

    codes (M, S Lp) uint8, scale (M, Ga) float32, zero_point (M, Ga) int32, sums (M, S) int32;
    `shape` is the input's. `plain_codes` leaves the padding out.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor
    num_bits: int
    group: int
    segment: int
    pairs: bool
    shape: torch.Size
    values: Tensor | None = None

    @property
    def plain_codes(self) -> Tensor:
        """(M, K) uint8."""
        cut = self.codes.unflatten(1, (self.sums.shape[1], -1))[..., : self.segment]
        return cut.flatten(1)


def layout(inputs: int, row_group: int | None, weight_group: int | None) -> tuple[int, int, int]:
    """(row group, weight group, segment) in channels."""
    row, weight = row_group or inputs, weight_group or inputs
    segment = min(row, weight)
    if inputs % row or inputs % weight or row % segment or weight % segment:
        raise ValueError(f"groups of {row} and {weight} for {inputs} inputs do not nest")
    return row, weight, segment


def padded(segment: int) -> int:
    return -(-segment // 64) * 64


def _per_image(t: Tensor, inputs: int, images: int, what: str) -> Tensor:
    """gain or shift as (1 or images, K)."""
    rows = t.reshape(-1, inputs)
    if rows.shape[0] not in (1, images):
        raise InputError(f"native core, {what}: {tuple(t.shape)}, expected one or {images} rows")
    return rows.contiguous()


def quantize(
    x: Tensor,
    *,
    num_bits: int,
    row_group: int | None = None,
    weight_group: int | None = None,
    sign_split: bool = False,
    codebook: Codebook | None = None,
    norm: Norm | None = None,
    gelu: bool = False,
    means: Tensor | None = None,
    mean_rows: Tensor | None = None,
    hadamard: int | None = None,
    layer: str = "",
    keep_values: bool = False,
) -> Rows:
    """Codes of x (..., K), float32 or bfloat16; (B, l, K) where something depends on the image or
    the token.

    In this order: `norm` or `gelu`, minus `means` (R, K) float32 at the rows `mean_rows` (l,) int32
    (without them row 0), rotation in blocks of `hadamard`, codes (of a codebook: entries plus 128).
    `keep_values` keeps what was quantized, for tests. Raises `NonFiniteError` naming `layer`."""
    inputs = x.shape[-1]
    row, _, segment = layout(inputs, row_group, weight_group)
    if x.dtype not in TYPES or not x.is_contiguous():
        x = x.contiguous() if x.dtype in TYPES else x.float().contiguous()
    m = x.numel() // inputs
    images = x.shape[0] if x.dim() == 3 else 1
    rows, segments = m * (1 + sign_split), inputs // segment
    codes = torch.empty((rows, segments * padded(segment)), dtype=torch.uint8, device="cpu")
    scale = torch.empty((rows, inputs // row), dtype=torch.float32, device="cpu")
    zero_point = torch.empty((rows, inputs // row), dtype=torch.int32, device="cpu")
    sums = torch.empty((rows, segments), dtype=torch.int32, device="cpu")
    values = torch.empty((m, inputs), dtype=torch.float32, device="cpu") if keep_values else None
    a = QuantizeArgs(rows=m, width=inputs, row_stride=inputs)
    a.x = pointer(x, f"input of layer {layer}", x.dtype, *x.shape)
    a.x_type, a.num_bits, a.sign_split = TYPES[x.dtype], 8 if codebook else num_bits, sign_split
    a.codebook = codebook.arguments() if codebook else CodebookArgs()
    a.group, a.segment, a.hadamard = row, segment, hadamard or 0
    a.rows_per_image = max(1, m // max(1, images))
    a.prologue = _NORM if norm else _GELU if gelu else _NO_PROLOGUE
    if norm:
        gain = _per_image(norm.gain, inputs, images, "gain")
        shift = _per_image(norm.shift, inputs, images, "shift")
        a.gain = pointer(gain, "gain", torch.float32, *gain.shape)
        a.shift, a.eps = pointer(shift, "shift", torch.float32, *gain.shape), norm.eps
        a.modulation_stride = inputs if gain.shape[0] > 1 else 0
    # Held until the call is over: the pointer keeps nothing alive.
    token_rows = per_token(mean_rows, a.rows_per_image)
    if means is not None:
        a.means = pointer(means, "means", torch.float32, len(means), inputs)
        if token_rows is not None:
            a.mean_row = row_numbers(token_rows, "mean_rows", a.rows_per_image, means)
    a.codes, a.scale, a.zero_point = codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
    a.sum, a.values = sums.data_ptr(), None if values is None else values.data_ptr()
    a.threads = torch.get_num_threads()
    if not call("vq_quantize", a):
        raise NonFiniteError(f"layer {layer}: input holds NaN or infinity")
    cut = (a.num_bits, row, segment, sign_split)
    return Rows(codes, scale, zero_point, sums, *cut, x.shape, values)
