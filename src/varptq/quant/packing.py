"""Packed storage of integer codes: a dense stream of b-bit fields in int32 words, low bits first.

    code i of a row occupies bits i*b .. i*b + b - 1; bit k is bit k % 32 of word k // 32

For 4 bits this is the layout of compressed-tensors (eight codes a word, the first in the lowest
nibble); widths that do not divide 32 straddle words, so nothing is wasted but the end of the last
word, which is zero. The pattern repeats every 32 / gcd(b, 32) codes, and one step moves the codes
at one place of the pattern for all rows at once; widths that divide a byte are read by bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

WORD_BITS = 32
BYTE_BITS = 8


class _Place(NamedTuple):
    """Code `code` of the pattern: from bit `shift` of `word` on, `spill` bits in the next word."""

    code: int
    word: int
    shift: int
    spill: int


def packed_words(n: int, num_bits: int) -> int:
    """int32 words of a row of n codes."""
    return -(-n * num_bits // WORD_BITS)


def _pattern(num_bits: int) -> tuple[int, int]:
    """Codes and words after which the layout repeats."""
    common = gcd(num_bits, WORD_BITS)
    return WORD_BITS // common, num_bits // common


def _places(num_bits: int) -> Iterator[_Place]:
    for index in range(_pattern(num_bits)[0]):
        word, shift = divmod(index * num_bits, WORD_BITS)
        yield _Place(index, word, shift, max(0, shift + num_bits - WORD_BITS))


def _padded(x: Tensor, multiple: int) -> Tensor:
    """x (rows, n) with zeros up to a multiple of columns, as (rows, n / multiple, multiple)."""
    missing = -x.shape[1] % multiple
    x = F.pad(x, (0, missing)) if missing else x
    return x.reshape(x.shape[0], x.shape[1] // multiple, multiple)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """codes (rows, n) uint8 to words (rows, ceil(n * num_bits / 32)) int32.

    Raises ValueError for a code that does not fit `num_bits`, which would overwrite its neighbours.
    """
    if codes.numel() and int(codes.max()) >> num_bits:
        raise ValueError(f"code {int(codes.max())} does not fit {num_bits} bits")
    rows, n = codes.shape
    pattern_codes, pattern_words = _pattern(num_bits)
    blocks = _padded(codes, pattern_codes)
    words = torch.zeros(
        (rows, blocks.shape[1], pattern_words), dtype=torch.int32, device=codes.device
    )
    for place in _places(num_bits):
        code = blocks[..., place.code].int()
        words[..., place.word].bitwise_or_(code << place.shift)
        if place.spill:
            words[..., place.word + 1].bitwise_or_(code >> (num_bits - place.spill))
    return words.flatten(1)[:, : packed_words(n, num_bits)].contiguous()


def unpack(words: Tensor, num_bits: int, n: int) -> Tensor:
    """words (rows, ceil(n * num_bits / 32)) int32 to codes (rows, n) uint8 of memory of their own:
    the inverse of `pack`.

    Raises ValueError where the number of words is not that of n codes.
    """
    rows, found = words.shape
    if found != packed_words(n, num_bits):
        raise ValueError(
            f"{found} words a row for {n} codes of {num_bits} bits, "
            f"expected {packed_words(n, num_bits)}"
        )
    if BYTE_BITS % num_bits == 0 and sys.byteorder == "little":
        codes = _from_bytes(words.contiguous().view(torch.uint8), num_bits)[:, :n]
        own = num_bits < BYTE_BITS and codes.is_contiguous()
        return codes if own else codes.clone()
    pattern_codes, pattern_words = _pattern(num_bits)
    blocks = _padded(words, pattern_words)
    codes = torch.empty(
        (rows, blocks.shape[1], pattern_codes), dtype=torch.uint8, device=words.device
    )
    for place in _places(num_bits):
        # >> keeps the sign, so everything above the field is masked away.
        kept = num_bits - place.spill
        code = (blocks[..., place.word] >> place.shift) & (2**kept - 1)
        if place.spill:
            code |= (blocks[..., place.word + 1] & (2**place.spill - 1)) << kept
        codes[..., place.code] = code
    return codes.flatten(1)[:, :n].contiguous()


def _from_bytes(codes: Tensor, num_bits: int) -> Tensor:
    """(rows, bytes) to (rows, codes), several codes a byte, the first one lowest: halves of bytes,
    and halves of those, each moved into a byte of its own."""
    for width in (4, 2, 1)[: (BYTE_BITS // num_bits).bit_length() - 1]:
        pairs = codes.to(torch.int16)
        pairs = (pairs << (BYTE_BITS - width)).bitwise_or_(pairs)
        codes = pairs.bitwise_and_((2**width - 1) * 0x0101).view(torch.uint8)
    return codes
