"""Packed codes: the bit layout against an integer oracle, round trips at every width and odd
sizes.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.packing import pack, packed_words, unpack

BITS = range(2, 9)
# Empty, one code, odd, one word less and more than a pattern of 32 codes, several patterns.
SIZES = st.sampled_from([0, 1, 3, 31, 32, 33, 37, 64, 130])


def random_codes(rows: int, n: int, num_bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**num_bits, (rows, n), generator=generator, dtype=torch.uint8)


def oracle(codes: list[int], num_bits: int) -> bytes:
    """One row as a single integer of n * b bits, little endian, filled up to whole words."""
    stream = sum(code << (num_bits * i) for i, code in enumerate(codes))
    return stream.to_bytes(4 * packed_words(len(codes), num_bits), "little")


@settings(deadline=None)
@given(st.sampled_from(BITS), st.sampled_from([0, 1, 3]), SIZES, st.integers(0, 99))
def test_layout_and_round_trip(num_bits: int, rows: int, n: int, seed: int) -> None:
    codes = random_codes(rows, n, num_bits, seed)
    words = pack(codes, num_bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape == (rows, -(-n * num_bits // 32))
    for row, packed in zip(codes.tolist(), words, strict=True):
        assert packed.numpy().astype("<i4").tobytes() == oracle(row, num_bits)
    back = unpack(words, num_bits, n)
    assert back.dtype == torch.uint8 and back.is_contiguous()
    assert torch.equal(back, codes)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("end", ["low", "high"])
def test_ends_of_the_code_range(num_bits: int, end: str) -> None:
    """All ones sets every sign bit: nothing may leak into a neighbour on the way back."""
    value = 0 if end == "low" else 2**num_bits - 1
    codes = torch.full((2, 37), value, dtype=torch.uint8)
    words = pack(codes, num_bits)
    assert torch.equal(unpack(words, num_bits, 37), codes)
    used = 37 * num_bits % 32
    if used:
        assert (int(words[0, -1]) & 0xFFFFFFFF) >> used == 0, "unused bits are zero"


def test_golden_bytes() -> None:
    """Written down by hand: eight nibbles a word, the first lowest; 3-bit codes straddle words."""
    nibbles = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15]], dtype=torch.uint8)
    assert [w & 0xFFFFFFFF for w in pack(nibbles, 4)[0].tolist()] == [0x87654321, 0x0000000F]
    triples = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 7, 5]], dtype=torch.uint8)
    words = [w & 0xFFFFFFFF for w in pack(triples, 3)[0].tolist()]
    # Bits 30..32 hold the eleventh code, 7: two ones end the first word, one begins the second.
    assert words == [0o76543210 | 1 << 27 | 0b11 << 30, 0b1 | 5 << 1]


def test_a_code_that_does_not_fit_is_refused() -> None:
    codes = torch.tensor([[0, 16]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 16 does not fit 4 bits"):
        pack(codes, 4)


def test_wrong_number_of_words_is_refused() -> None:
    words = pack(random_codes(2, 37, 4, 0), 4)
    with pytest.raises(ValueError, match="5 words a row for 41 codes of 4 bits, expected 6"):
        unpack(words, 4, 41)


def test_rows_are_independent() -> None:
    codes = random_codes(3, 37, 5, 1)
    words = pack(codes, 5)
    for i in range(3):
        assert torch.equal(pack(codes[i : i + 1], 5), words[i : i + 1])


def test_strided_input() -> None:
    codes = random_codes(37, 3, 6, 2)
    assert torch.equal(pack(codes.T, 6), pack(codes.T.contiguous(), 6))
