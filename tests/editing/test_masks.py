"""Geometry and masks against brute force: which pixels, which tokens, which weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varptq.editing.frame import FITS, Frame
from varptq.editing.masks import (
    alpha_mask,
    box_mask,
    feather_width,
    feathered,
    forced_ids,
    keep_mask,
    picture_mask,
)
from varptq.errors import InputError
from varptq.models.scales import Scales

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
fits = st.sampled_from(FITS)
SIDE, P = 16, 4
MODEL, LAST = (SIDE, SIDE), (P, P)


def noise(size: tuple[int, int], channels: int, seed: int = 0) -> Image.Image:
    shape = (size[1], size[0], channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def random_mask(size: tuple[int, int], share: float, seed: int) -> Image.Image:
    white = np.random.default_rng(seed).random((size[1], size[0])) < share
    return Image.fromarray(white.astype(np.uint8) * 255)


def test_crop_is_the_centred_square_and_pad_the_whole_image() -> None:
    assert Frame.of((37, 20), (16, 16), "crop").seen == (8, 0, 28, 20)
    assert Frame.of((20, 37), (16, 16), "crop").seen == (0, 8, 20, 28)
    pad = Frame.of((40, 20), (16, 16), "pad")
    assert (pad.seen, pad.inner) == ((0, 0, 40, 20), (0, 4, 16, 12))
    thin = Frame.of((5000, 1), (16, 16), "pad")
    assert thin.inner == (0, 7, 16, 8)


def test_an_image_of_the_models_size_passes_through() -> None:
    image = noise((SIDE, SIDE), 3)
    for fit in FITS:
        assert (
            np.asarray(Frame.of(image.size, MODEL, fit).to_model(image)) == np.asarray(image)
        ).all()


def test_padding_repeats_the_edge() -> None:
    image = Image.fromarray(np.array([[[9, 0, 0]] * 2, [[0, 9, 0]] * 2], np.uint8))
    tall = Frame.of((2, 2), (2, 2), "crop").to_model(image).resize((4, 2), Image.Resampling.NEAREST)
    square = np.asarray(Frame.of((4, 2), (4, 4), "pad").to_model(tall))
    assert (square[:2] == (9, 0, 0)).all() and (square[2:] == (0, 9, 0)).all()


@settings(max_examples=60)
@given(sizes, fits, st.sampled_from([3, 4]), st.integers(0, 5))
def test_pasting_leaves_what_has_no_weight(
    size: tuple[int, int], fit: str, channels: int, feather: int
) -> None:
    frame, image = Frame.of(size, MODEL, fit), noise(size, channels)
    weight = feathered(random_mask(size, 0.05, 1), feather, frame)
    pasted = np.asarray(frame.paste(image, noise((SIDE, SIDE), 3, 2), weight))
    untouched = np.asarray(weight) == 0
    assert pasted.shape == (size[1], size[0], channels)
    assert (pasted[untouched] == np.asarray(image)[untouched]).all()


def test_a_feather_wider_than_the_image_is_as_wide_as_it() -> None:
    frame = Frame.of((37, 21), MODEL, "crop")
    mask = Image.new("L", (37, 21))
    mask.putpixel((18, 3), 255)
    seen = np.asarray(feathered(mask, 10**30, frame).crop(frame.seen))
    assert (seen == 255).all()
    assert feathered(mask, 42, frame) == feathered(mask, 10**30, frame)


def test_the_new_picture_replaces_the_old_on_the_mask() -> None:
    frame = Frame.of((SIDE, SIDE), MODEL, "crop")
    for channels in (3, 4):
        new, weight = noise((SIDE, SIDE), 3, 2), Image.new("L", MODEL, 255)
        pasted = np.asarray(frame.paste(noise((SIDE, SIDE), channels), new, weight))
        assert (pasted[..., :3] == np.asarray(new)).all()
        assert (pasted[..., 3:] == 255).all()


@settings(max_examples=60)
@given(sizes, fits, st.data())
def test_one_white_pixel_reaches_its_token(
    size: tuple[int, int], fit: str, data: st.DataObject
) -> None:
    frame = Frame.of(size, MODEL, fit)
    left, top, right, bottom = frame.seen
    x, y = data.draw(st.integers(left, right - 1)), data.draw(st.integers(top, bottom - 1))
    image = Image.new("L", size)
    image.putpixel((x, y), 255)
    cells = picture_mask(image, frame, LAST).cells_PQ
    centre = []
    for value, first, last, start, end in zip(
        (x, y), frame.seen[:2], frame.seen[2:], frame.inner[:2], frame.inner[2:], strict=True
    ):
        share = (value + 0.5 - first) / (last - first)
        centre.append((start + share * (end - start)) * P / SIDE)
    # Within a pixel of the model, which is a quarter of a token here.
    found = np.argwhere(cells)
    assert len(found)
    nearest = np.abs(found[:, ::-1] + 0.5 - centre).max(1).min()
    assert nearest <= 0.5 + P / SIDE


def test_one_white_pixel_of_a_large_image_is_not_rounded_away() -> None:
    image = Image.new("L", (1500, 1200))
    image.putpixel((750, 600), 255)
    assert picture_mask(image, Frame.of(image.size, MODEL, "crop"), LAST).cells_PQ.sum() == 1


def test_pixels_beyond_the_crop_are_no_tokens_and_get_no_weight() -> None:
    frame = Frame.of((30, 10), MODEL, "crop")
    white = Image.new("L", (30, 10))
    white.paste(255, (0, 0, 9, 10))
    mask = picture_mask(white, frame, LAST)
    assert not mask.cells_PQ.any()
    assert feathered(mask.pixels, 6, frame).getbbox() is None


coordinates = st.one_of(
    st.floats(0, 1),
    st.integers(0, 64).map(lambda n: n / 64),
    st.integers(0, 20).map(lambda n: n / 20),
)


@given(
    st.tuples(coordinates, coordinates, coordinates, coordinates),
    st.sampled_from([1, 3, 5, 8, 16, 32]),
    st.integers(1, 300),
    st.booleans(),
)
def test_a_box_takes_the_tokens_that_the_var_code_takes(
    box: tuple[float, float, float, float], side: int, size: int, inside: bool
) -> None:
    x0, x1, y0, y1 = (*sorted(box[:2]), *sorted(box[2:]))
    if x0 == x1 or y0 == y1:
        return
    expected = np.full((side, side), not inside)
    expected[round(y0 * side) : round(y1 * side), round(x0 * side) : round(x1 * side)] = inside
    frame = Frame.of((size, size), (2 * side, 2 * side), "crop")
    found = box_mask((x0, y0, x1, y1), frame, (side, side), inside=inside)
    assert (found.cells_PQ == expected).all()


def test_a_box_is_relative_to_the_whole_image() -> None:
    # The right half of a 40 x 20 image; the crop shows columns 10 to 30.
    frame = Frame.of((40, 20), MODEL, "crop")
    mask = box_mask((0.5, 0, 1, 1), frame, LAST, inside=True)
    assert mask.cells_PQ.any(0).tolist() == [False, False, True, True]
    assert mask.pixels.getbbox() == (20, 0, 40, 20)
    padded = box_mask((0.5, 0, 1, 1), Frame.of((40, 20), MODEL, "pad"), LAST, inside=True)
    assert padded.cells_PQ.tolist() == [[False] * 4, *[[False, False, True, True]] * 2, [False] * 4]


@pytest.mark.parametrize(
    "box",
    [
        (),
        (0, 0, 1),
        (0.5, 0, 0.5, 1),
        (0, 0.7, 1, 0.2),
        (-0.1, 0, 1, 1),
        (0, 0, 1, 1.1),
        (0, 0, math.nan, 1),
        (0, 0, 1, math.inf),
        (0, 0, 1, 1, 1),
    ],
)
def test_what_is_no_box_is_refused(box: tuple[float, ...]) -> None:
    frame = Frame.of((8, 8), MODEL, "crop")
    with pytest.raises(InputError, match=r"box .*: expected x0,y0,x1,y1 with 0 <= x0 < x1 <= 1"):
        box_mask(box, frame, LAST, inside=True)


def bilinear(grid: np.ndarray, side: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, no antialias: written out."""
    n = len(grid)
    result = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            y, x = (min(max((k + 0.5) * n / side - 0.5, 0), n - 1) for k in (i, j))
            top, left = int(y), int(x)
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                row, column = min(top + dy, n - 1), min(left + dx, n - 1)
                share = abs(1 - dy - (y - top)) * abs(1 - dx - (x - left))
                result[i, j] += share * grid[row, column]
    return result


@pytest.mark.slow
@given(
    st.sampled_from([(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 8), (2, 3, 7), (1,), (3,)]),
    st.floats(0, 1),
    st.integers(0, 2**20),
)
def test_scales_keep_what_the_resized_mask_keeps(
    sides: tuple[int, ...], share: float, seed: int
) -> None:
    scales = Scales(sides)
    cells = np.random.default_rng(seed).random((sides[-1], sides[-1])) < share
    keep_L = keep_mask(cells, scales)
    for side, part in zip(sides, scales.slices(), strict=True):
        resized = bilinear((~cells).astype(float), side)
        expected = (resized > 0.5) | (side * side <= 3)
        # Where the mean is one half in exact numbers, either rounding is right.
        decided = np.abs(resized - 0.5) > 1e-6
        found = keep_L[part].numpy().reshape(side, side)
        assert (found == expected)[decided | (side * side <= 3)].all()


def test_one_half_is_not_kept() -> None:
    cells = np.array([[False, True, False, False]] * 4)
    assert keep_mask(cells, Scales((2, 4))).tolist()[:4] == [False, True, False, True]


def test_forced_ids_are_given_or_free() -> None:
    ids = torch.arange(14).view(1, 14)
    keep = keep_mask(np.array([[True, False, False]] * 3), Scales((1, 2, 3)))
    forced = forced_ids(ids, keep)
    assert (forced[0, keep] == ids[0, keep]).all() and (forced[0, ~keep] == -1).all()
    assert keep[0] and not keep[5] and keep[6]


@pytest.mark.slow
@settings(max_examples=60)
@given(sizes, fits, st.integers(0, 9), st.floats(0, 0.2), st.integers(0, 2**20))
def test_the_feather_is_a_band_around_the_mask(
    size: tuple[int, int], fit: str, width: int, share: float, seed: int
) -> None:
    frame, mask = Frame.of(size, MODEL, fit), random_mask(size, share, seed)
    weight = np.asarray(feathered(mask, width, frame)).astype(int)
    left, top, right, bottom = frame.seen
    seen = np.zeros((size[1], size[0]), bool)
    seen[top:bottom, left:right] = True
    white = np.argwhere((np.asarray(mask) > 0) & seen)
    for y, x in np.ndindex(weight.shape):
        distance = np.abs(white - (y, x)).max(1).min() if len(white) else np.inf
        if distance == 0:
            assert weight[y, x] == 255
        elif distance > width or not seen[y, x]:
            assert weight[y, x] == 0


def test_the_feather_falls_outwards() -> None:
    frame = Frame.of((41, 41), (41, 41), "crop")
    mask = Image.new("L", (41, 41))
    mask.paste(255, (0, 0, 11, 41))
    row = np.asarray(feathered(mask, 8, frame))[20].astype(int)
    assert (row[:11] == 255).all() and (row[19:] == 0).all()
    assert (np.diff(row[10:20]) < 0).all()


def test_the_feather_width_is_half_a_token() -> None:
    assert feather_width(None, Frame.of((32, 32), (32, 32), "crop"), (8, 8)) == 2
    assert feather_width(None, Frame.of((4000, 3000), (256, 256), "crop"), (16, 16)) == round(
        3000 / 16 / 2
    )
    assert feather_width(None, Frame.of((4000, 3000), (256, 256), "pad"), (16, 16)) == round(
        4000 / 16 / 2
    )
    assert feather_width(None, Frame.of((1, 1), (32, 32), "crop"), (8, 8)) == 0


@pytest.mark.parametrize(
    ("pixel", "mode", "white"),
    [
        (255, "L", True), (128, "L", True), (127, "L", False), (1, "1", True),
        ((255, 255, 255, 255), "RGBA", True),
        ((255, 255, 255, 0), "RGBA", False),  # not painted
        ((0, 0, 0, 255), "RGBA", False),
        ((255, 255, 255), "RGB", True), ((60, 0, 0), "RGB", False),
    ],
)  # fmt: skip
def test_white_is_regenerated(pixel: Any, mode: str, white: bool) -> None:
    frame = Frame.of((SIDE, SIDE), MODEL, "crop")
    image = Image.new(mode, MODEL, pixel)
    image.paste("white", (0, 0, P, P))  # without any white it would be refused
    mask = picture_mask(image, frame, LAST)
    assert mask.cells_PQ[0, 0] and mask.cells_PQ.sum() == (P * P if white else 1)
    assert mask.pixels.getextrema() == ((255, 255) if white else (0, 255))


def test_transparent_pixels_are_regenerated() -> None:
    image = Image.new("RGBA", MODEL, (9, 9, 9, 128))
    image.paste((9, 9, 9, 127), (0, 0, 4, 4))
    mask = alpha_mask(image, Frame.of(image.size, MODEL, "crop"), LAST)
    assert mask.cells_PQ.sum() == 1 and mask.cells_PQ[0, 0]


def test_a_mask_of_another_size_is_refused() -> None:
    frame = Frame.of((20, 10), MODEL, "crop")
    with pytest.raises(InputError, match=r"mask: 10 x 20 pixels, the image has 20 x 10"):
        picture_mask(Image.new("L", (10, 20), 255), frame, LAST)


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(InputError, match="fit 'stretch': unknown, expected crop or pad"):
        Frame.of((20, 10), MODEL, "stretch")
