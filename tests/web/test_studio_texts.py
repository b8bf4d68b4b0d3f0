"""The studio in a real browser with a model that reads texts and draws at several sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from PIL import Image

from helpers import text_program
from helpers.studio_pages import (
    DESK,
    IN_BROWSER,
    PHONE,
    SMALL,
    choose,
    downloaded,
    downloaded_anew,
    fits,
    photo,
    said,
    shoot,
    turn,
    upload,
    use_box,
)
from varptq.models.generate import generate
from varptq.models.prompt_files import bundled_prompts
from varptq.pictures import to_pixels

TEXT, ARTIFACT = text_program.NAME, "text-w8a8"
# Of the model's sizes, that of the ratio 0.5: twice as wide as high.
WIDE, NAME = "88 x 44", "0.06M:0.5"

pytestmark = IN_BROWSER


@pytest.fixture(scope="session")
def artifact(served: Any) -> str:
    """Of the model, made by the studio itself for the prompts of the package."""
    from helpers.studio_calls import Caller  # wants what the studio wants

    answer = Caller(served.address).call(
        "quantize", TEXT, "w8a8", "rtn", "fast", 2, 1, 0, ARTIFACT, True
    )
    assert answer.ok, answer.error
    return f"made/{ARTIFACT}"


def slider(page: Any, label: str) -> float:
    return float(page.get_by_label(f"number input for {label}").input_value())


def prompt_box(page: Any, tab: str) -> Any:
    return page.locator(f"#{tab}-prompt textarea")


def test_a_text_is_drawn_at_a_size(open_page: Callable[..., Any], artifact: str) -> None:
    page = open_page("Generate")
    choose(page, "generate-model", TEXT)
    prompt_box(page, "generate").wait_for()
    choose(page, "generate-beside", artifact)
    assert page.locator("#generate-class").count() == 0
    page.locator("#generate-examples").get_by_text(bundled_prompts()[2]).first.click()
    page.wait_for_timeout(500)
    assert prompt_box(page, "generate").input_value() == bundled_prompts()[2]
    prompt_box(page, "generate").fill("two red boats")
    page.locator("#generate-negative textarea").fill("rain")
    choose(page, "generate-size", WIDE)
    page.locator("#generate-start").click()
    for panel in ("first", "second"):
        page.locator(f"#generate-{panel}-facts dl").wait_for()
        strip = page.locator(f"#generate-{panel}-scales img")
        assert strip.count() == text_program.MAPS
    for size, scheme in ((DESK, "light"), (PHONE, "dark")):
        turn(page, size, scheme)
        for panel in ("first", "second"):
            box = page.locator(f"#generate-{panel}-scales img").first.bounding_box()
            assert box["width"] / box["height"] == pytest.approx(2, rel=0.05)
        assert fits(page)
        shoot(page, f"texts-{size[0]}-{scheme}")
    page.locator("#generate-first-download").wait_for()
    download = downloaded(page, "generate-first-download")
    assert download.suggested_filename == "two-red-boats-seed0-0.png"
    drawn = generate(
        text_program.model(), ["two red boats"] * 4, negative="rain", size=NAME, seed=0
    )
    assert drawn.images is not None
    found = np.asarray(Image.open(download.path()).convert("RGB")).astype(int)
    assert np.abs(found - to_pixels(drawn.images)[0]).max() <= 1


def test_controls_follow_the_chosen_models(open_page: Callable[..., Any]) -> None:
    page = open_page("Generate")
    page.get_by_role("button", name="Sampling").click()
    choose(page, "generate-beside", "nothing")
    guidance, top_k = "Guidance (cfg)", "Top-k, 0 for all"
    assert (slider(page, guidance), slider(page, top_k)) == (1.5, 900)
    assert page.locator("#generate-prompt").count() == 0
    page.get_by_label(f"number input for {guidance}").fill("4")
    choose(page, "generate-model", SMALL)
    page.locator("#generate-about").filter(has_text="5 classes").wait_for()
    # The other model draws by the same settings, so what was chosen stays.
    assert slider(page, guidance) == 4
    choose(page, "generate-model", TEXT)
    page.locator("#generate-about").filter(has_text="reads texts, 64 x 64 pixels").wait_for()
    page.locator("#generate-size").wait_for()
    assert (slider(page, guidance), slider(page, top_k)) == (3, 0)
    assert slider(page, "Divisor (tau)") == 0.5
    # Each of two models is asked for what it understands.
    choose(page, "generate-beside", "demo")
    page.locator("#generate-class").wait_for()
    choose(page, "generate-class", "ship")
    page.locator("#generate-start").click()
    for panel in ("first", "second"):
        page.locator(f"#generate-{panel}-download").wait_for()
    names = [
        downloaded(page, f"generate-{panel}-download").suggested_filename
        for panel in ("first", "second")
    ]
    assert names[1] == "ship-seed0-0.png" and names[0] != names[1]
    prompt_box(page, "generate").fill("")
    page.locator("#generate-start").click()
    said(page, "prompt: empty; say what to draw")


def test_edits_with_and_without_a_text(open_page: Callable[..., Any], artifact: str) -> None:
    """Without one by the quantized model at a desk, with one by the float model on a phone."""
    page = open_page("Edit", DESK, "dark")
    choose(page, "edit-model", artifact)
    prompt_box(page, "edit").wait_for()
    upload(page, photo((300, 170)))
    use_box(page, 0.5)
    page.locator("#edit-start").click()
    page.locator("#edit-download").wait_for()
    assert downloaded(page, "edit-download").suggested_filename == "edit-seed0-0.png"
    page.get_by_label("Change", exact=True).check()
    page.locator("#edit-start").click()
    said(page, "task prompt: no prompt given; give a text that says what to change to")
    assert fits(page)
    shoot(page, f"texts-edit-{DESK[0]}-dark")
    turn(page, PHONE, "light")
    choose(page, "edit-model", TEXT)
    prompt_box(page, "edit").fill("one green door")
    page.locator("#edit-start").click()
    download = downloaded_anew(page, "edit-download", "one-green-door-seed0-0.png")
    edited, before = Image.open(download.path()), photo((300, 170))
    assert edited.size == (300, 170)
    assert fits(page)
    shoot(page, f"texts-edit-{PHONE[0]}-light")
    assert Path(download.path()).read_bytes() != before
