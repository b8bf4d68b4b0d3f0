"""The integer Linear on the native core (src/linear/): weights packed once, codes times weights.

    weight = pack(codes, scale, zero_point, num_bits=8, row_group=None) -> PackedWeight
    y = linear(rows, weight, bias=None, bias_rows=None, dtype=torch.float32) -> (..., N)
    p = accumulate(rows, weight) -> (rows, N, S) int32, for tests

Rows come from quantize.py, which says how codes lie; the group of a weight is read off its scale.
src/linear/linear.h says what is summed in which order. Results do not depend on threads, which are
torch's. Shapes: M rows, K inputs, N outputs, Gw groups of weights, S segments, P panels of 64
outputs.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.native.binding import call, library
from varptq.native.pointers import TYPES, per_token, pointer, row_numbers
from varptq.native.quantize import Rows, layout, padded
from varptq.native.room import Room

PANEL = 64
# Entries that a byte shuffle of every instruction set looks up, and the widths that have no more.
TABLE, TABLE_BITS = 16, 4


class PackArgs(ctypes.Structure):
    """vq_pack_args of src/linear/linear.h, field by field in the same order."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("codes", c_void_p),
        ("zero_point", c_void_p),
        ("scale", c_void_p),
        ("num_bits", c_int32),
        ("table", c_void_p),
        ("group", c_int64),
        ("segment", c_int64),
        ("packed", c_void_p),
        ("panel_scale", c_void_p),
        ("panel_zero", c_void_p),
        ("panel_sum", c_void_p),
        ("threads", c_int32),
    )


class LinearArgs(ctypes.Structure):
    """vq_linear_args of src/linear/linear.h, field by field in the same order."""

    _fields_ = (
        ("rows", c_int64),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("row_group", c_int64),
        ("weight_group", c_int64),
        ("segment", c_int64),
        ("row_bits", c_int32),
        ("weight_bits", c_int32),
        ("pairs", c_int32),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("sum", c_void_p),
        ("packed", c_void_p),
        ("table", c_void_p),
        ("panel_scale", c_void_p),
        ("panel_zero", c_void_p),
        ("panel_sum", c_void_p),
        ("bias", c_void_p),
        ("bias_row", c_void_p),
        ("rows_per_image", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("y_type", c_int32),
        ("products", c_void_p),
        ("threads", c_int32),
    )


class PackedWeight(NamedTuple):
    """A weight in the kernels' layout: packed uint8, and by panels of 64 outputs scale (P, Gw, 64),
    zero_point (P, Gw, 64) and sums (P, S, 64) of the stored values. table: (16,) int8, what codes
    stand for, or None."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor
    num_bits: int
    group: int
    row_group: int
    segment: int
    outputs: int
    inputs: int
    table: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero_point, self.sums))


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    num_bits: int,
    row_group: int | None = None,
    table: Tensor | None = None,
) -> PackedWeight:
    """codes (N, K) uint8, scale and integer-valued zero_point (N, Gw) as in a QuantLinear;
    `row_group` is the group of the activations it will meet. table: (2^b,) int8, b at most 4, where
    codes are its indices."""
    outputs, inputs = codes.shape
    row, group, segment = layout(inputs, row_group, inputs // scale.shape[1])
    panels = -(-outputs // PANEL)
    zero_point = zero_point.to(torch.int32).contiguous()
    scale, codes = scale.float().contiguous(), codes.contiguous()
    packed = aligned_bytes(library().vq_packed_bytes(outputs, inputs, segment, num_bits))
    panel_scale = torch.empty((panels, inputs // group, PANEL), dtype=torch.float32, device="cpu")
    panel_zero = torch.empty((panels, inputs // group, PANEL), dtype=torch.int32, device="cpu")
    panel_sum = torch.empty((panels, inputs // segment, PANEL), dtype=torch.int32, device="cpu")
    a = PackArgs(outputs=outputs, inputs=inputs, num_bits=num_bits, group=group, segment=segment)
    a.codes = pointer(codes, "codes", torch.uint8, outputs, inputs)
    a.zero_point = pointer(zero_point, "zero_point", torch.int32, outputs, inputs // group)
    a.scale = pointer(scale, "scale", torch.float32, outputs, inputs // group)
    if table is not None:
        table = F.pad(table, (0, TABLE - len(table)))
        a.table = pointer(table, "table", torch.int8, TABLE)
    a.packed, a.panel_scale = packed.data_ptr(), panel_scale.data_ptr()
    a.panel_zero, a.panel_sum = panel_zero.data_ptr(), panel_sum.data_ptr()
    a.threads = torch.get_num_threads()
    call("vq_pack", a)
    return PackedWeight(
        *(packed, panel_scale, panel_zero, panel_sum),
        *(num_bits, group, row, segment, outputs, inputs),
        table,
    )


def aligned_bytes(size: int) -> Tensor:
    """uint8 tensor whose data starts at a multiple of 64 bytes, so that no load crosses a line."""
    whole = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    start = -whole.data_ptr() % 64
    return whole[start : start + size]


def _linear_args(rows: Rows, weight: PackedWeight) -> LinearArgs:
    if (rows.segment, rows.group) != (weight.segment, weight.row_group):
        raise ValueError(
            f"rows in groups of {rows.group} and segments of {rows.segment}, the weight was packed "
            f"for {weight.row_group} and {weight.segment}"
        )
    a = LinearArgs(rows=rows.codes.shape[0], outputs=weight.outputs, inputs=weight.inputs)
    a.rows_per_image = 1
    a.row_group, a.weight_group, a.segment = rows.group, weight.group, rows.segment
    a.row_bits, a.weight_bits, a.pairs = rows.num_bits, weight.num_bits, rows.pairs
    groups, segments = a.inputs // a.row_group, a.inputs // a.segment
    width = segments * padded(a.segment)
    a.codes = pointer(rows.codes, "codes", torch.uint8, a.rows, width)
    a.scale = pointer(rows.scale, "scale", torch.float32, a.rows, groups)
    a.zero_point = pointer(rows.zero_point, "zero_point", torch.int32, a.rows, groups)
    a.sum = pointer(rows.sums, "sums", torch.int32, a.rows, segments)
    size = library().vq_packed_bytes(a.outputs, a.inputs, a.segment, a.weight_bits)
    panels, groups = -(-weight.outputs // PANEL), a.inputs // a.weight_group
    a.packed = pointer(weight.packed, "weight", torch.uint8, size)
    if weight.table is not None:
        a.table = pointer(weight.table, "table", torch.int8, TABLE)
    a.panel_scale = pointer(weight.scale, "weight's scale", torch.float32, panels, groups, PANEL)
    a.panel_zero = pointer(weight.zero_point, "weight's zero", torch.int32, panels, groups, PANEL)
    a.panel_sum = pointer(weight.sums, "weight's sums", torch.int32, panels, segments, PANEL)
    a.threads = torch.get_num_threads()
    return a


def linear(
    rows: Rows,
    weight: PackedWeight,
    bias: Tensor | None = None,
    bias_rows: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    room: Room | None = None,
) -> Tensor:
    """y (..., N) of dtype float32 or bfloat16. bias float32, (N,) or a table (R, N) that a token
    takes the row `bias_rows` (l,) int32 of (without them row 0). y lies in `room`, if there is
    one."""
    a = _linear_args(rows, weight)
    shape = rows.shape
    y = (room or Room()).empty((*shape[:-1], weight.outputs), dtype)
    m = y.numel() // weight.outputs
    a.rows_per_image = max(1, m // max(1, shape[0] if len(shape) == 3 else 1))
    # Held until the call is over: the pointer keeps nothing alive.
    token_rows = per_token(bias_rows, a.rows_per_image)
    if bias is not None:
        table = bias.view(-1, weight.outputs)
        a.bias = pointer(table, "bias", torch.float32, *table.shape)
        if token_rows is not None:
            a.bias_row = row_numbers(token_rows, "bias_rows", a.rows_per_image, table)
    a.y, a.y_stride, a.y_type = y.data_ptr(), weight.outputs, TYPES[dtype]
    call("vq_linear", a)
    return y


def accumulate(rows: Rows, weight: PackedWeight) -> Tensor:
    """The exact integers behind `linear`: sum of (a - za)(w - zw) over each segment, (rows, N, S)
    int32."""
    a = _linear_args(rows, weight)
    products = torch.empty(
        (a.rows, weight.outputs, rows.sums.shape[1]), dtype=torch.int32, device="cpu"
    )
    a.products = products.data_ptr()
    call("vq_accumulate", a)
    return products
