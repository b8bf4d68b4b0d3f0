"""Triton: slices of floats on a codebook, the definition of quant/codebook.py to the bit.

    start = rms(x) reach    c = entry nearest to x / start    s = <x, c> / <c, c>

Stored is c itself: the byte 128 + c and its zero point 128, both less 128. A float sum adds two
numbers at a time, halves onto halves, so its order is that of the definition on every machine;
products must not be contracted into those sums: launches say `enable_fp_fusion=False`. Of a table
of at most 16 entries, as a weight's, a kernel keeps two words of 64 bits and shifts a code's byte
out of them.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from varptq.quant.codebook import HALVES, reach
from varptq.quant.quantizers import QUANTIZERS

# As in quant/affine.py: a smaller scale is no normal float.
LEAST_SCALE = tl.constexpr(2.0**-126)
EXPONENT = tl.constexpr(0x7F800000)
WORD_ENTRIES = 8


@cache
def book(type_: str, num_bits: int, device: torch.device) -> Tensor | None:
    """What kernels read of a codebook, (1 + 2^(b-1),) float32: its reach, then the positive half
    of its entries. None for a type that has no table."""
    if QUANTIZERS[type_].table is None:
        return None
    numbers = (reach(num_bits), *HALVES[num_bits])
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def positive_entries(book: Tensor | None) -> int:
    """How many entries above zero a book has, which kernels take as a constant; 0 without one."""
    return 0 if book is None else len(book) - 1


def words(table: Tensor) -> Tensor:
    """(2,) int64 whose bytes are the entries of a table of up to 16, int8."""
    return F.pad(table, (0, 2 * WORD_ENTRIES - len(table))).view(torch.int64)


@triton.jit
def looked_up(codes, words_ptr):
    """The int8 entries that codes, 0 to 15, stand for."""
    word = tl.where(codes < 8, tl.load(words_ptr), tl.load(words_ptr + 1))
    return (word >> ((codes & 7).to(tl.int64) * 8)).to(tl.int8)


@triton.jit
def _halving_sum(x, SLICES: tl.constexpr, SIZE: tl.constexpr):
    """(SLICES,) sums of x (SLICES, SIZE): `ordered_sum` of quant/codebook.py."""
    for level in tl.static_range(1, 20):
        if 2**level <= SIZE:
            halves = tl.reshape(x, (SLICES, 2, SIZE // 2**level))
            first, second = tl.split(tl.permute(halves, (0, 2, 1)))
            x = first + second
    return tl.reshape(x, (SLICES,))


@triton.jit
def _nearest(size, book_ptr, ENTRIES: tl.constexpr):
    """The positive entry nearest to each size, on a border the larger."""
    below = tl.load(book_ptr + 1)
    found = tl.zeros_like(size) + below
    for i in tl.static_range(2, ENTRIES + 1):
        entry = tl.load(book_ptr + i)
        found = tl.where(size >= 0.5 * (below + entry), entry, found)
        below = entry
    return found


@triton.jit
def on_codebook(
    x, width, book_ptr, ENTRIES: tl.constexpr, SLICES: tl.constexpr, SIZE: tl.constexpr
):
    """Entries (SLICES, SIZE) and scales (SLICES,), float32, of the slices of x, which are SIZE long
    or, where there is one, `width` long with zeros behind. A slice that holds NaN or infinity has
    the scale NaN."""
    length = tl.minimum(width, SIZE)
    smallest = tl.load(book_ptr + 1)
    negative = x < 0
    largest = tl.max(tl.abs(x), axis=1)
    power = (largest.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    unit = tl.where(largest >= LEAST_SCALE, power, 1.0)
    x = tl.div_rn(x, unit[:, None])
    mean = tl.div_rn(_halving_sum(x * x, SLICES, SIZE), length.to(tl.float32))
    start = tl.sqrt_rn(mean) * tl.load(book_ptr)
    size = tl.div_rn(tl.abs(x), tl.where(start > 0, start, 1.0)[:, None])
    found = _nearest(size, book_ptr, ENTRIES)
    entries = tl.where(negative, -found, found)
    # Zeros behind the end lie on the smallest entry.
    behind = (SIZE - length) * (smallest * smallest).to(tl.int32)
    squares = tl.sum((found * found).to(tl.int32), axis=1) - behind
    scale = tl.div_rn(_halving_sum(x * entries, SLICES, SIZE), squares.to(tl.float32)) * unit
    # Not `scale >= LEAST_SCALE`, which would lose NaN.
    empty = (scale < LEAST_SCALE) | (start * unit < LEAST_SCALE)
    entries = tl.where(empty[:, None], tl.where(negative, -smallest, smallest), entries)
    return entries, tl.where(empty, 0.0, scale)
