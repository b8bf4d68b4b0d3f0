"""The text encoder without weights, and bits that answer flipped ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varptq.models.infinity.pyramid import BitPyramid
from varptq.models.infinity.words import SHARE_OF_PLACE, HashedWords
from varptq.models.scales import Scales


def test_rows_are_words() -> None:
    encoder = HashedWords(64, 8)
    first, second = encoder.features(["a red car", "A RED, car!"])
    assert first.shape == (3, 64) and first.dtype == torch.float32
    assert torch.equal(first, second)
    # A word is the same wherever it stands, but for its place.
    other = encoder.features(["car a red"])[0]
    assert torch.equal(first[2].sign(), other[0].sign())
    assert not torch.equal(first[2], other[0])


def test_words_are_signs_of_a_hash() -> None:
    """Written out once: another hash would make the trained weights worthless."""
    row = HashedWords(10, 4).features(["frog"])[0][0]
    place = torch.tensor([0.0, SHARE_OF_PLACE] * 5)
    assert (row - place).tolist() == [-1, 1, 1, -1, 1, 1, -1, -1, 1, -1]


def test_places_are_sines_and_cosines() -> None:
    rows = HashedWords(6, 4).features(["x x x"])[0]
    difference = rows[2] - rows[0]
    for pair in range(3):
        angle = 2 / 1000 ** (2 * pair / 6)
        expected = (SHARE_OF_PLACE * math.sin(angle), SHARE_OF_PLACE * (math.cos(angle) - 1))
        assert difference[2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_different_words_are_nearly_orthogonal() -> None:
    text = " ".join(f"word{number}" for number in range(60))
    signs = HashedWords(128, 60).features([text])[0].sign()
    products = (signs @ signs.T / 128).fill_diagonal_(0)
    assert float(products.abs().max()) < 0.5


@given(st.text(max_size=200))
def test_any_string_is_read(text: str) -> None:
    (found,) = HashedWords(5, 7).features([text])
    assert 1 <= len(found) <= 7 and found.shape[1] == 5 and bool(found.isfinite().all())


def test_long_texts_are_cut_and_empty_ones_are_one_row() -> None:
    encoder = HashedWords(8, 3)
    long, short, empty = encoder.features(["a b c d e", "a b c", " ,.! "])
    assert torch.equal(long, short)
    assert empty.tolist() == [[0.0, SHARE_OF_PLACE] * 4]


def test_finer_scales_answer_flipped_bits() -> None:
    """Greedily: each bit is the sign of what is missing after all that was added, mistakes too."""
    pyramid = BitPyramid(Scales((1, 2, 5)), 3, False, torch.zeros(1))
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, 5, 5, generator=draws)
    flips = torch.rand(4, 30, 3, generator=draws) < 0.3
    bits = pyramid.encode(features, flips)
    added = bits ^ flips.long()
    for scale, part in enumerate(pyramid.scales.slices()):
        f_hat = pyramid.accumulate(added[:, : part.start]) if part.start else torch.zeros(1)
        missing = torch.nn.functional.adaptive_avg_pool2d(features - f_hat, (1, 2, 5)[scale])
        assert torch.equal(bits[:, part], (missing.flatten(2).transpose(1, 2) > 0).long())
    assert torch.equal(pyramid.encode(features, torch.zeros_like(flips)), pyramid.encode(features))
