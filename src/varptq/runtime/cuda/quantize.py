"""Triton: rows of floats to codes, with what comes before the quantizer in the same pass.

    x -> modulated LayerNorm or GELU -> minus the mean of its scale -> Hadamard blocks -> per group
    s = (hi - lo) / (2^b - 1)    z = clamp(rint(-lo / s))    a = clamp(rint(x / s) + z)

or on a codebook (codebook.py). One program a row, the row in registers. Codes leave as int8: as
they are up to 7 bits, less 128 at 8 bits, with zero points shifted alike, since tensor cores
multiply signed by signed. The numeric definition is quant/affine.py, quant/sign_split.py and
quant/transforms.py, step by step. Nothing here needs a GPU to be imported or, under
TRITON_INTERPRET=1, to be run.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from varptq.runtime.cuda.codebook import LEAST_SCALE, on_codebook, positive_entries

NO_PROLOGUE, NORM, GELU = 0, 1, 2
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 half to even, on any device.
ROUNDER = tl.constexpr(12582912.0)
# As in quant/affine.py: a step that is no normal float is replaced; GELU and probabilities have
# units of their own, and a floor.
EMPTY_SCALE = tl.constexpr(2.0**-64)
SCALE_FLOOR = tl.constexpr(1e-6)
GELU_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


class CodeRows(NamedTuple):
    """Quantized rows: codes (R, K) int8, scale (R, G) float32, zero_point and sum (R, G), (R, S)
    int32; R is twice the rows of the input where they are sign-split."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sum: Tensor


@triton.jit
def _rint(x):
    return (x + ROUNDER) - ROUNDER


@triton.jit
def step_of(low, high, TOP: tl.constexpr):
    """Scale of an affine range with zero in it; halves do not overflow where high - low would."""
    scale = tl.div_rn(0.5 * high - 0.5 * low, 0.5 * TOP)
    return tl.where(scale >= LEAST_SCALE, scale, EMPTY_SCALE)


@triton.jit
def _butterfly(y, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """Sums and differences of entries `STRIDE` apart."""
    pairs = tl.reshape(y, (WIDTH // (2 * STRIDE), 2, STRIDE))
    first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
    joined = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(joined, (0, 2, 1)), (WIDTH,))


@triton.jit
def _rotate(x, sign, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x diag(sign) H in blocks: strides 1, 2, 4, ..., BLOCK / 2."""
    y = x * sign
    for level in tl.static_range(10):
        if 2**level < BLOCK:
            y = _butterfly(y, WIDTH, 2**level)
    return y


@triton.jit
def _store_side(
    codes, scale, zero, row, k, codes_ptr, scale_ptr, zero_ptr, sum_ptr, width,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Write one row of codes (WIDTH // GROUP, GROUP) float32 with its grids and segment sums."""
    groups = (width + GROUP - 1) // GROUP
    g = tl.arange(0, WIDTH // GROUP)
    tl.store(scale_ptr + row * groups + g, scale, mask=g < groups)
    tl.store(zero_ptr + row * groups + g, zero.to(tl.int32) - OFFSET, mask=g < groups)
    flat = tl.reshape(codes, (WIDTH,)).to(tl.int32) - OFFSET
    flat = tl.where(k < width, flat, 0)
    tl.store(codes_ptr + row * width + k, flat.to(tl.int8), mask=k < width)
    segments = (width + SEGMENT - 1) // SEGMENT
    s = tl.arange(0, WIDTH // SEGMENT)
    sums = tl.sum(tl.reshape(flat, (WIDTH // SEGMENT, SEGMENT)), axis=1)
    tl.store(sum_ptr + row * segments + s, sums, mask=s < segments)


@triton.jit
def _quantize(
    x_ptr, gain_ptr, shift_ptr, means_ptr, mean_row_ptr, sign_ptr, book_ptr,
    codes_ptr, scale_ptr, zero_ptr, sum_ptr,
    width, row_stride, modulation_stride, rows_per_image, eps, root,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    PROLOGUE: tl.constexpr, CENTRED: tl.constexpr, SPLIT: tl.constexpr, TOP: tl.constexpr,
    OFFSET: tl.constexpr, BOOK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < width
    x = tl.load(x_ptr + row * row_stride + k, mask=inside, other=0.0).to(tl.float32)
    if PROLOGUE == 1:
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(inside, x - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / width
        image = row // rows_per_image
        gain = tl.load(gain_ptr + image * modulation_stride + k, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + image * modulation_stride + k, mask=inside, other=0.0)
        x = centred * (1.0 / tl.sqrt(variance + eps)) * (1.0 + gain) + shift
    if PROLOGUE == 2:
        # 0.5 (1 + tanh u) is the logistic function of 2 u.
        x = x / (1.0 + tl.exp(-(x + GELU_CUBE * x * x * x) * GELU_SCALE))
    if CENTRED:
        mean_row = tl.load(mean_row_ptr + row % rows_per_image)
        x = x - tl.load(means_ptr + mean_row * width + k, mask=inside, other=0.0)
    if BLOCK > 0:
        x = _rotate(x, tl.load(sign_ptr + k % BLOCK), WIDTH, BLOCK) * root
    x = tl.where(inside, x, 0.0)
    grouped = tl.reshape(x, (WIDTH // GROUP, GROUP))
    high = tl.maximum(tl.max(grouped, axis=1), 0.0)
    low = tl.minimum(tl.min(grouped, axis=1), 0.0)
    if BOOK > 0:
        entries, scale = on_codebook(grouped, width, book_ptr, BOOK, WIDTH // GROUP, GROUP)
        _store_side(entries, scale, tl.zeros_like(scale), row, k, codes_ptr, scale_ptr,
                    zero_ptr, sum_ptr, width, WIDTH, GROUP, SEGMENT, 0)  # fmt: skip
    elif SPLIT:
        positive = tl.maximum(tl.div_rn(high, TOP), SCALE_FLOOR)
        negative = tl.maximum(tl.div_rn(-low, TOP), SCALE_FLOOR)
        up = tl.maximum(grouped, 0.0)
        down = tl.maximum(-grouped, 0.0)
        per_side = tl.minimum(_rint(tl.div_rn(up, positive[:, None])), TOP)
        _store_side(per_side, positive, 0.0 * positive, 2 * row, k, codes_ptr, scale_ptr,
                    zero_ptr, sum_ptr, width, WIDTH, GROUP, SEGMENT, 0)  # fmt: skip
        per_side = tl.minimum(_rint(tl.div_rn(down, negative[:, None])), TOP)
        _store_side(per_side, -negative, 0.0 * negative, 2 * row + 1, k, codes_ptr, scale_ptr,
                    zero_ptr, sum_ptr, width, WIDTH, GROUP, SEGMENT, 0)  # fmt: skip
    else:
        scale = step_of(low, high, TOP)
        zero = tl.minimum(tl.maximum(_rint(-tl.div_rn(low, scale)), 0.0), TOP)
        steps = _rint(tl.div_rn(grouped, scale[:, None]))
        codes = tl.minimum(tl.maximum(steps + zero[:, None], 0.0), TOP)
        _store_side(codes, scale, zero, row, k, codes_ptr, scale_ptr, zero_ptr, sum_ptr,
                    width, WIDTH, GROUP, SEGMENT, OFFSET)  # fmt: skip


def quantize(
    x_MK: Tensor,
    *,
    num_bits: int,
    group: int,
    segment: int,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    gelu: bool = False,
    rows_per_image: int = 1,
    eps: float = 1e-6,
    means: Tensor | None = None,
    mean_row: Tensor | None = None,
    signs: Tensor | None = None,
    sign_split: bool = False,
    book: Tensor | None = None,
) -> CodeRows:
    """Codes of x (M, K) float32 or bfloat16, `group` channels a scale, sums per `segment`.

    gain, shift (images, K): the rows' LayerNorm is modulated with those of image
    m // rows_per_image. means (rows, K), mean_row (rows_per_image,) int32: centring. signs (n,):
    rotation in blocks of n. book: the codebook whose entries are the codes, from `codebook.book`.
    group and segment divide K; where K is no power of two they must be K or powers of two.
    """
    rows, width = x_MK.shape
    # A group that is the whole row spans the padding too: zeros change no range that holds zero.
    padded = triton.next_power_of_2(width)
    group_padded, segment_padded = (padded if n == width else n for n in (group, segment))
    out_rows = 2 * rows if sign_split else rows
    device = x_MK.device
    codes = torch.empty(out_rows, width, dtype=torch.int8, device=device)
    scale = torch.empty(out_rows, width // group, dtype=torch.float32, device=device)
    zero = torch.empty(out_rows, width // group, dtype=torch.int32, device=device)
    sums = torch.empty(out_rows, width // segment, dtype=torch.int32, device=device)
    prologue = NORM if gain is not None else GELU if gelu else NO_PROLOGUE
    block = 0 if signs is None else len(signs)
    top = 2 ** (num_bits - 1) - 1 if sign_split else 2**num_bits - 1
    _quantize[(rows,)](
        x_MK, gain, shift, means, mean_row, signs, book, codes, scale, zero, sums,
        width, x_MK.stride(0), 0 if gain is None else gain.stride(0), rows_per_image, eps,
        _root(block or 1),
        WIDTH=padded, GROUP=group_padded, SEGMENT=segment_padded, BLOCK=block,
        PROLOGUE=prologue, CENTRED=means is not None, SPLIT=sign_split, TOP=float(top),
        OFFSET=128 if num_bits == 8 and not sign_split else 0, BOOK=positive_entries(book),
        num_warps=4 if padded <= 2048 else 8, enable_fp_fusion=False,
    )  # fmt: skip
    return CodeRows(codes, scale, zero, sums)


@functools.cache
def _root(block: int) -> float:
    """block^-0.5 as the definition has it, in float32."""
    return float(torch.tensor(block, dtype=torch.float32, device="cpu").pow(-0.5))
