"""Using the studio in a real browser as a person would: picking, typing, uploading, looking.

What a page may complain of and ask for is watched by the fixture `open_page` (web/conftest.py).
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PICTURES = Path(__file__).parents[2] / "out" / "studio"
PATIENCE, TRIES = 60_000, 30
DESK, PHONE = (1280, 860), (390, 844)
DEMO_ARTIFACT = "made/demo-w4a4"
SMALL, MADE = "models/small/var.safetensors", "models/w4a4"
# One worker for all tests of a running studio: it is started once, and so is the browser.
STUDIO = pytest.mark.xdist_group("studio")
IN_BROWSER = [
    pytest.mark.web,
    STUDIO,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the studio with"),
]


def choose(page: Any, picker: str, value: str) -> None:
    """Pick the option that begins with `value` by typing it, as a search."""
    field = page.locator(f"#{picker} input")
    first = page.locator("[role=option]").first.filter(has_text=value)
    # The list of a tab that has just been opened is about to be filled, which ends a search.
    for _ in range(TRIES):
        field.press("Escape")
        field.click()
        field.press("Control+a")
        # Key by key: only those make the list shorter, and Enter takes its first option.
        field.press_sequentially(value)
        page.wait_for_timeout(200)
        if first.count():
            field.press("Enter")
            field.press("Escape")
            if field.input_value().startswith(value):
                return
    pytest.fail(f"{picker}: no {value} to choose")


def enter(page: Any, picker: str, value: str) -> None:
    """Type `value` into a picker that takes what is no option too."""
    field = page.locator(f"#{picker} input")
    field.click()
    field.fill(value)
    field.press("Enter")
    field.press("Escape")
    assert field.input_value() == value


def shoot(page: Any, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def turn(page: Any, size: tuple[int, int], scheme: str) -> None:
    """Give an open page another size, and light or dark colours."""
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme=scheme)


def fits(page: Any) -> bool:
    """Whether nothing hangs over the side of the page."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def said(page: Any, text: str) -> None:
    """Wait for a toast with that text."""
    page.locator(".toast-body").filter(has_text=text).first.wait_for()
    page.wait_for_timeout(300)  # it slides in


def slow_down(page: Any, times: int) -> None:
    """Let the page compute that many times slower, so that it is caught unready."""
    session = page.context.new_cdp_session(page)
    session.send("Emulation.setCPUThrottlingRate", {"rate": times})


def downloaded(page: Any, button: str) -> Any:
    """What a click on a button downloads."""
    with page.expect_download() as download:
        page.locator(f"#{button}").click()
    return download.value


def downloaded_anew(page: Any, button: str, name: str) -> Any:
    """The same where an earlier result's file is behind the button until the new one arrives."""
    for _ in range(40):
        download = downloaded(page, button)
        if download.suggested_filename == name:
            return download
        page.wait_for_timeout(250)
    raise AssertionError(f"{button}: still downloads {download.suggested_filename}, not {name}")


def photo(size: tuple[int, int] = (300, 240)) -> bytes:
    rows, columns = np.mgrid[: size[1], : size[0]]
    pixels = np.stack((rows % 256, columns % 256, (rows + columns) % 256), axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def upload(page: Any, content: bytes, name: str = "photo.png") -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#edit-upload input[type=file]").set_input_files(file)


def tab_to(page: Any, element: str) -> None:
    """Press Tab until `element` has the focus, which is seen there and on the way."""
    hidden = "e => getComputedStyle(e).outlineStyle !== 'solid'"
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate_handle("document.activeElement")
        if focused.evaluate("e => e.matches('button, summary, textarea, [type=number]')"):
            assert not focused.evaluate(hidden), focused.evaluate("e => e.outerHTML")
        if focused.evaluate("e => e.id") == element:
            return
    pytest.fail("Tab never comes to the button")


def use_box(page: Any, right: float) -> None:
    """Regenerate the left part of the picture, up to `right`."""
    page.get_by_role("button", name="A box instead of painting").click()
    page.get_by_label("Use the box").check()
    for side, value in (("Left", 0), ("Top", 0), ("Right", right), ("Bottom", 1)):
        page.get_by_label(f"number input for {side}", exact=True).fill(str(value))
