"""The tab Edit in a real browser: upload, paint, choose, download, and what cannot be used."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from PIL import Image

from helpers.picture_files import png_header
from helpers.studio_pages import (
    DEMO_ARTIFACT,
    IN_BROWSER,
    MADE,
    PHONE,
    choose,
    downloaded,
    downloaded_anew,
    enter,
    fits,
    photo,
    said,
    shoot,
    slow_down,
    upload,
    use_box,
)

pytestmark = IN_BROWSER


def test_paint_and_in_paint(open_page: Callable[..., Any], artifact: None) -> None:
    page = open_page("Edit", (900, 1500))
    choose(page, "edit-model", DEMO_ARTIFACT)
    upload(page, photo())
    canvas = page.locator("#edit-canvas canvas").first
    page.wait_for_timeout(1500)
    page.locator("#edit-start").click()
    said(page, "mask: empty. Paint what is to be drawn anew.")
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=4)
    page.mouse.move(x + 20, y + 40, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.locator("#edit-start").click()
    page.locator("#edit-download").wait_for()
    candidates = page.locator("#edit-candidates img")
    assert candidates.count() == 4
    assert page.locator("#edit-slider img").count() == 2
    # Whatever was clicked before, the one that is shown is downloaded.
    assert downloaded(page, "edit-download").suggested_filename == "edit-seed0-0.png"
    page.locator("#edit-candidates button").nth(2).click()
    download = downloaded_anew(page, "edit-download", "edit-seed0-2.png")
    edited = np.asarray(Image.open(download.path()).convert("RGB")).astype(int)
    before = np.asarray(Image.open(io.BytesIO(photo()))).astype(int)
    assert edited.shape == before.shape
    changed = np.abs(edited - before).max(axis=-1) > 0
    # The middle was painted; far from it every pixel is the upload's own.
    assert changed[110:130, 140:160].any()
    assert not changed[:, :40].any() and not changed[:, -40:].any()
    shoot(page, "edit-900")


def test_the_first_candidate_is_downloaded_without_a_click_on_it(
    open_page: Callable[..., Any],
) -> None:
    """On a slow machine, where a button may be seen before its file has come; and once more with
    another picture, and with one of one pixel, all of it."""
    page = open_page("Edit")
    choose(page, "edit-model", MADE)
    use_box(page, 0.5)
    page.get_by_label("Change", exact=True).check()
    enter(page, "edit-class", "cat")
    for size in ((300, 240), (90, 120), (1, 1)):
        if size == (1, 1):
            page.get_by_label("number input for Right", exact=True).fill("1")
        upload(page, photo(size))
        page.locator("#edit-download").wait_for(state="hidden")
        page.wait_for_timeout(500)
        slow_down(page, 6)
        page.locator("#edit-start").click()
        page.locator("#edit-download").wait_for()
        slow_down(page, 1)
        download = downloaded(page, "edit-download")
        assert download.suggested_filename == "cat-seed0-0.png"
        assert Image.open(download.path()).size == size
        page.get_by_label("Clear").first.click()


def test_a_bad_upload_is_named(open_page: Callable[..., Any]) -> None:
    page = open_page("Edit", PHONE)
    for content, says in (
        (b"no picture", "photo.png: not a JPEG"),
        (photo()[:300], "photo.png: cannot be read"),
        (png_header(30_000, 30_000), "its header claims far more than 25 megapixels"),
    ):
        upload(page, content)
        said(page, says)
        assert fits(page)
        shoot(page, "edit-390-toast")
        page.get_by_label("Clear").first.click()


def test_what_an_edit_cannot_use_is_said(open_page: Callable[..., Any]) -> None:
    page = open_page("Edit")
    choose(page, "edit-model", MADE)
    page.locator("#edit-start").click()
    said(page, "image: none given; upload a JPEG, PNG or WebP")
    upload(page, photo())
    use_box(page, 1)
    page.locator("#edit-start").click()
    said(page, "box: full, so no token of the 3 x 3 grid is kept")
    page.get_by_label("Change", exact=True).check()
    enter(page, "edit-class", "kat")
    page.locator("#edit-start").click()
    said(page, "class 'kat': unknown; did you mean cat")
    enter(page, "edit-class", "cat")
    page.locator("#edit-start").click()
    page.locator("#edit-download").wait_for()
    assert page.locator("#edit-candidates img").count() == 4
