"""Triton: codes times codes, with zero points and scales of both sides in the epilogue.

    P' = sum over a segment of (a - za)(w - zw)      exact in int32
       = P - za W1 - zw (A1 - L za)                  P = sum a w, W1 = sum w, A1 = sum a, L length
    y  = bias + sum over weight groups of sw sum over their activation groups of sa P'

A segment is the finer of an activation and a weight group. Weights of 8 bits are stored less 128,
below that as they are, 4 bits and below two to a byte: in a block of 128 inputs byte j holds input
j in its low and j + 64 in its high half. Codes of a table are multiplied as its entries, with zero
point 0: two to a byte they are looked up tile by tile, others are stored as entries. One
accumulator per output and no split over K, so a row's result does not depend on the batch. 4-bit
groups save memory, not time, where tensor cores have no 4-bit mode (Hopper): each group costs float
work on the partial sums.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from varptq.runtime.cuda.codebook import looked_up, words
from varptq.runtime.cuda.quantize import CodeRows
from varptq.runtime.kernels import Weight

NIBBLE_BLOCK, NIBBLE_HALF = 128, 64
# The smallest K of an 8-bit tensor-core product; rows and columns are padded to 16 by masks.
MIN_K = 32


class CudaWeight(NamedTuple):
    """A packed weight (N, K): codes int8 (N, K), or uint8 (N, K / 2) where `nibbles`; scale and
    zero_point (N, Gw), sum (N, S) int32 of what is multiplied; words (2,) int64, the table that
    nibbles are looked up in, if there is one."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sum: Tensor
    inputs: int
    segment: int
    nibbles: bool
    words: Tensor | None = None


def pack(weight: Weight, segment: int) -> CudaWeight:
    """Stored form of a weight, on its device. segment: inputs that share a scale on both sides."""
    outputs, inputs = weight.codes.shape
    whole = weight.in_bytes()
    offset = 128 if whole.num_bits == 8 else 0
    stored = (whole.codes.int() - offset).to(torch.int8)
    sums = stored.int().unflatten(1, (-1, segment)).sum(-1, dtype=torch.int32)
    zero = (whole.zero_point - offset).to(torch.int32)
    nibbles = weight.num_bits <= 4 and segment % NIBBLE_HALF == 0 and inputs % NIBBLE_BLOCK == 0
    if nibbles:
        halves = weight.codes.view(outputs, -1, 2, NIBBLE_HALF)
        stored = (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1).contiguous()
    table = words(weight.table) if nibbles and weight.table is not None else None
    scale, zero = weight.scale.contiguous(), zero.contiguous()
    return CudaWeight(stored, scale, zero, sums, inputs, segment, nibbles, table)


@triton.jit
def _load_weight(
    w_ptr, words_ptr, n, k, width, outputs, NIBBLES: tl.constexpr, TABLE: tl.constexpr
):
    """(BK, BN) int8 tile of what is multiplied at inputs k and outputs n."""
    inside = (n[None, :] < outputs) & (k[:, None] < width)
    if NIBBLES:
        place = (k // 128) * 64 + k % 64
        byte = tl.load(w_ptr + n[None, :] * (width // 2) + place[:, None], mask=inside, other=0)
        codes = (byte >> ((k // 64) % 2 * 4)[:, None].to(tl.uint8)) & 15
        if TABLE:
            codes = looked_up(codes, words_ptr)
    else:
        codes = tl.load(w_ptr + n[None, :] * width + k[:, None], mask=inside, other=0)
    return codes.to(tl.int8)


@triton.jit
def _linear(
    a_ptr, sa_ptr, za_ptr, a1_ptr, w_ptr, words_ptr, sw_ptr, zw_ptr, w1_ptr,
    bias_ptr, bias_row_ptr, y_ptr,
    rows, outputs, width, row_groups, weight_groups, segments, segment, per,
    rows_per_image, GROUPED: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    NIBBLES: tl.constexpr, TABLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """GROUPED: activations have more than one group a row. PER: segments of a weight group.

    EXACT writes P' (rows, outputs, segments) int32 instead of y.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    in_m, in_n = m < rows, n < outputs
    inside = in_m[:, None] & in_n[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for gw in range(weight_groups):
        sw = tl.load(sw_ptr + n * weight_groups + gw, mask=in_n, other=0.0)
        zw = tl.load(zw_ptr + n * weight_groups + gw, mask=in_n, other=0)
        part = tl.zeros((BM, BN), dtype=tl.float32)
        for i in range(per):
            s = gw * per + i
            acc = tl.zeros((BM, BN), dtype=tl.int32)
            for start in range(0, segment, BK):
                k = s * segment + start + tl.arange(0, BK)
                in_k = (start + tl.arange(0, BK)) < segment
                a_at = m[:, None].to(tl.int64) * width + k[None, :]
                a = tl.load(a_ptr + a_at, mask=in_m[:, None] & in_k[None, :], other=0)
                w = _load_weight(w_ptr, words_ptr, n, tl.where(in_k, k, width), width, outputs,
                                 NIBBLES, TABLE)  # fmt: skip
                acc += tl.dot(a, w, out_dtype=tl.int32)
            ga = (s * row_groups) // segments
            za = tl.load(za_ptr + m * row_groups + ga, mask=in_m, other=0)
            a1 = tl.load(a1_ptr + m * segments + s, mask=in_m, other=0)
            w1 = tl.load(w1_ptr + n * segments + s, mask=in_n, other=0)
            acc -= za[:, None] * w1[None, :] + zw[None, :] * (a1 - segment * za)[:, None]
            if EXACT:
                place = (m[:, None].to(tl.int64) * outputs + n[None, :]) * segments + s
                tl.store(y_ptr + place, acc, mask=inside)
            if GROUPED:
                sa = tl.load(sa_ptr + m * row_groups + ga, mask=in_m, other=0.0)
                part += acc.to(tl.float32) * sa[:, None]
            else:
                part += acc.to(tl.float32)
        total += part * sw[None, :]
    if not EXACT:
        if not GROUPED:
            total = total * tl.load(sa_ptr + m * row_groups, mask=in_m, other=0.0)[:, None]
        if BIAS:
            at = tl.load(bias_row_ptr + m % rows_per_image, mask=in_m, other=0)
            where = bias_ptr + at[:, None] * outputs + n[None, :]
            total += tl.load(where, mask=inside, other=0.0)
        tl.store(y_ptr + m[:, None].to(tl.int64) * outputs + n[None, :], total, mask=inside)


def linear(
    rows: CodeRows,
    weight: CudaWeight,
    *,
    bias: Tensor | None = None,
    bias_row: Tensor | None = None,
    rows_per_image: int = 1,
    pairs: bool = False,
    exact: bool = False,
) -> Tensor:
    """(R, K) codes times a weight (N, K): y (R, N) float32, or with `exact` P' (R, N, S) int32.

    bias (rows of bias, N); bias_row (rows_per_image,) int32 says which one row m takes. pairs:
    sign-split rows, y (R / 2, N) is the sum of each two.
    """
    count, outputs = len(rows.codes), len(weight.codes)
    segments = weight.inputs // weight.segment
    row_groups, weight_groups = rows.scale.shape[1], weight.scale.shape[1]
    shape = (count, outputs, segments) if exact else (count, outputs)
    dtype = torch.int32 if exact else torch.float32
    y = torch.empty(shape, dtype=dtype, device=rows.codes.device)
    tile_m = 16 if count <= 16 else 32 if count <= 32 else 64
    tile_k = max(MIN_K, min(128, triton.next_power_of_2(weight.segment)))
    with_bias = bias is not None and not pairs and not exact
    if bias_row is None:
        bias_row = torch.zeros(rows_per_image, dtype=torch.int32, device=y.device)
    _linear[(triton.cdiv(count, tile_m), triton.cdiv(outputs, 64))](
        rows.codes, rows.scale, rows.zero_point, rows.sum,
        weight.codes, weight.words, weight.scale, weight.zero_point, weight.sum, bias, bias_row, y,
        count, outputs, weight.inputs, row_groups, weight_groups, segments, weight.segment,
        segments // weight_groups, rows_per_image, GROUPED=row_groups > 1,
        BIAS=with_bias, EXACT=exact, NIBBLES=weight.nibbles,
        TABLE=weight.words is not None, BM=tile_m, BN=64, BK=tile_k,
    )  # fmt: skip
    if not pairs or exact:
        return y
    y = y[0::2] + y[1::2]
    if bias is None:
        return y
    images = bias[bias_row.long()].repeat(len(y) // rows_per_image, 1)
    return y + images
