"""The studio in a real browser: every tab used as a person would, at a desk and on a phone.

Pictures of the pages go to out/studio. At the end of every test no request has left the machine and
no page has complained.
"""

from __future__ import annotations

import importlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from PIL import Image

from picture_files import png_header
from studio_calls import Caller
from varptq.runtime.load import choose as choose_runtime

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PICTURES = Path(__file__).parents[2] / "out" / "studio"
PATIENCE = 60_000
DESK, PHONE = (1280, 860), (390, 844)
DEMO_ARTIFACT = "made/demo-w4a4"
SMALL, MADE = "models/small/var.safetensors", "models/w4a4"
# What the button of each tab says.
TABS = {"Generate": "Generate", "Edit": "Edit", "Quantize": "Quantize", "Results": "Measure"}

pytestmark = [
    pytest.mark.web,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the studio with"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright", reason="no playwright to drive a browser with")
    with importlib.import_module(f"{playwright.__name__}.sync_api").sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def artifact(served: Any) -> None:
    """`DEMO_ARTIFACT`, made by the studio itself."""
    settings = ("w4a4", "rtn", "fast", 2, 1, 0, DEMO_ARTIFACT.partition("/")[2], True)
    answer = Caller(served.address).call("quantize", "demo", *settings)
    assert answer.ok, answer.error


@pytest.fixture
def open_page(served: Any, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the studio on a tab; watches what the page asks for and complains of."""
    asked, complaints, contexts, addresses = [], [], [], []

    def opened(
        tab: str, size: tuple[int, int] = DESK, scheme: str = "light", studio: Any = served
    ) -> Any:
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        addresses.append(studio.address)
        page.goto(studio.address)
        page.locator("#generate-model input").wait_for()
        page.get_by_role("tab", name=tab).click()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert asked and not [
        url for url in asked if not url.startswith((*addresses, "data:", "blob:"))
    ]
    assert not complaints


def choose(page: Any, picker: str, value: str) -> None:
    """Pick the option that begins with `value` by typing it, as a search."""
    field = page.locator(f"#{picker} input")
    first = page.locator("[role=option]").first.filter(has_text=value)
    # The list of a tab that has just been opened is about to be filled, which ends a search.
    for _ in range(10):
        field.press("Escape")
        field.click()
        field.press("Control+a")
        # Key by key: only those make the list shorter, and Enter takes its first option.
        field.press_sequentially(value)
        page.wait_for_timeout(500)
        if first.count():
            break
    field.press("Enter")
    field.press("Escape")
    assert field.input_value().startswith(value)


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


def fits(page: Any) -> bool:
    """Whether nothing hangs over the side of the page."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def said(page: Any, text: str) -> None:
    """Wait for a toast with that text."""
    page.locator(".toast-body").filter(has_text=text).first.wait_for()
    page.wait_for_timeout(300)  # it slides in


def photo(size: tuple[int, int] = (300, 240)) -> bytes:
    rows, columns = np.mgrid[: size[1], : size[0]]
    pixels = np.stack((rows % 256, columns % 256, (rows + columns) % 256), axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def upload(page: Any, content: bytes, name: str = "photo.png") -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#edit-upload input[type=file]").set_input_files(file)


@pytest.mark.parametrize(
    ("size", "scheme"),
    [(DESK, "light"), (DESK, "dark"), (PHONE, "light")],
    ids=["desk", "dark", "phone"],
)
def test_two_models_draw_side_by_side_and_scale_by_scale(
    open_page: Callable[..., Any],
    served: Any,
    artifact: None,
    size: tuple[int, int],
    scheme: str,
) -> None:
    page = open_page("Generate", size, scheme)
    choose(page, "generate-beside", DEMO_ARTIFACT)
    choose(page, "generate-class", "ship")
    page.locator("#generate-start").click()
    for panel in ("first", "second"):
        page.locator(f"#generate-{panel}-facts dl").wait_for()
        facts = page.locator(f"#generate-{panel}-facts").inner_text()
        assert all(word in facts for word in ("Time", "Memory", "Bits"))
        assert page.locator(f"#generate-{panel} img").count() == 4
        assert page.locator(f"#generate-{panel}-scales img").count() == 6
    facts = page.locator("#generate-second-facts").inner_text()
    assert "w4a4" in facts and f"runtime {choose_runtime(served.out / 'demo-w4a4').name}" in facts
    assert fits(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 80) is (scheme == "dark")
    shoot(page, f"generate-{size[0]}-{scheme}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("tab", TABS)
def test_every_tab_fits_a_phone_and_says_what_its_buttons_do(
    open_page: Callable[..., Any], tab: str, scheme: str
) -> None:
    page = open_page(tab, PHONE, scheme)
    page.wait_for_timeout(1500)  # what the page asks for when it is opened has come
    assert fits(page)
    for name, word in TABS.items():
        page.get_by_role("tab", name=name).click()
        start, stop = (page.locator(f"#{name.lower()}-{which}") for which in ("start", "stop"))
        assert (start.inner_text(), stop.inner_text()) == (word, "Stop")
    page.get_by_role("tab", name=tab).click()
    shoot(page, f"{tab.lower()}-empty-390-{scheme}")


@pytest.mark.parametrize("tab", TABS)
def test_the_keyboard_comes_to_every_button(open_page: Callable[..., Any], tab: str) -> None:
    page = open_page(tab)
    page.get_by_role("tab", name=tab).focus()
    tab_to(page, f"{tab.lower()}-start")


def test_the_keyboard_alone_is_enough_to_draw(open_page: Callable[..., Any]) -> None:
    page = open_page("Generate")
    choose(page, "generate-model", SMALL)
    choose(page, "generate-beside", "nothing")
    enter(page, "generate-class", "3")
    tab_to(page, "generate-start")
    page.keyboard.press("Enter")
    page.locator("#generate-first-facts dl").wait_for()


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


def test_an_unknown_class_is_answered_with_a_near_one(open_page: Callable[..., Any]) -> None:
    page = open_page("Generate")
    choose(page, "generate-beside", "nothing")
    enter(page, "generate-class", "kat")
    page.locator("#generate-start").click()
    said(page, "class 'kat': unknown; did you mean cat?")
    shoot(page, "toast-1280")
    enter(page, "generate-class", "<b>&lt;script&gt;</b>")
    page.locator("#generate-start").click()
    said(page, "class '<b>&lt;script&gt;</b>': unknown")
    # The button is ready for the next try.
    page.locator("#generate-start:enabled").wait_for()


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
    page.locator("#edit-candidates button").nth(2).click()
    with page.expect_download() as download:
        page.wait_for_timeout(800)
        page.locator("#edit-download").click()
    assert download.value.suggested_filename == "edit-0-2.png"
    edited = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    before = np.asarray(Image.open(io.BytesIO(photo()))).astype(int)
    assert edited.shape == before.shape
    changed = np.abs(edited - before).max(axis=-1) > 0
    # The middle was painted; far from it every pixel is the upload's own.
    assert changed[110:130, 140:160].any()
    assert not changed[:, :40].any() and not changed[:, -40:].any()
    shoot(page, "edit-900")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no picture", "photo.png: is no JPEG"),
        (photo()[:300], "photo.png: cannot be read"),
        (png_header(30_000, 30_000), "its header claims far more than 25 megapixels"),
    ],
    ids=["text", "cut", "bomb"],
)
def test_a_bad_upload_is_named(open_page: Callable[..., Any], content: bytes, says: str) -> None:
    page = open_page("Edit", PHONE)
    upload(page, content)
    said(page, says)
    assert fits(page)
    shoot(page, "edit-390-toast")


def use_box(page: Any, right: float) -> None:
    """Regenerate the left part of the picture, up to `right`."""
    page.get_by_role("button", name="A box instead of painting").click()
    page.get_by_label("Use the box").check()
    for side, value in (("Left", 0), ("Top", 0), ("Right", right), ("Bottom", 1)):
        page.get_by_label(f"number input for {side}").fill(str(value))


def test_what_an_edit_cannot_use_is_said(open_page: Callable[..., Any]) -> None:
    page = open_page("Edit")
    choose(page, "edit-model", MADE)
    page.locator("#edit-start").click()
    said(page, "image: none; upload a JPEG, PNG or WebP")
    upload(page, photo())
    use_box(page, 1)
    page.locator("#edit-start").click()
    said(page, "box: full, no token of the 3 x 3 grid is kept")
    page.get_by_label("Change class").check()
    enter(page, "edit-class", "kat")
    page.locator("#edit-start").click()
    said(page, "class 'kat': unknown; did you mean cat")
    enter(page, "edit-class", "cat")
    page.locator("#edit-start").click()
    page.locator("#edit-download").wait_for()
    assert page.locator("#edit-candidates img").count() == 4


def test_a_picture_of_one_pixel_is_edited(open_page: Callable[..., Any]) -> None:
    page = open_page("Edit")
    choose(page, "edit-model", MADE)
    upload(page, photo((1, 1)), "dot.png")
    use_box(page, 1)
    page.get_by_label("Change class").check()
    enter(page, "edit-class", "cat")
    page.locator("#edit-start").click()
    page.locator("#edit-download").wait_for()


def test_a_runtime_that_is_missing_is_said(
    open_page: Callable[..., Any], without_cuda: Any
) -> None:
    page = open_page("Generate", studio=without_cuda)
    choose(page, "generate-model", MADE)
    choose(page, "generate-beside", "nothing")
    page.locator("#generate-start").click()
    said(page, "runtime 'cuda': computes on cuda, the device is cpu; use runtime simulated")
    page.locator("#generate-start:enabled").wait_for()


def test_quantize_with_a_tiny_setting(
    open_page: Callable[..., Any], served: Any, tmp_path: Path
) -> None:
    page = open_page("Quantize")
    choose(page, "quantize-model", SMALL)
    page.get_by_label("brecq").check()
    choose(page, "quantize-calibration", "default: ")
    page.get_by_role("button", name="Single settings").click()
    page.locator("#q-samples input").fill("2")
    page.locator("#q-steps input").fill("30")
    page.locator("#quantize-name textarea, #quantize-name input").fill("by-hand")
    page.locator("#quantize-start").click()
    page.locator("#quantize-download").wait_for()
    curves = page.locator("#quantize-curves figure")
    assert curves.count() >= 6 and "attn" in curves.nth(2).inner_text()
    assert "smaller than float32" in page.locator("#quantize-summary").inner_text()
    assert (served.out / "by-hand" / "config.json").is_file()
    with page.expect_download() as download:
        page.locator("#quantize-download").click()
    assert download.value.suggested_filename == "by-hand.zip"
    assert fits(page)
    shoot(page, "quantize-1280")
    page.locator("#quantize-start").click()
    said(page, "name 'by-hand': exists")
    page.get_by_role("tab", name="Generate").click()
    choose(page, "generate-model", "made/by-hand")
    choose(page, "generate-beside", "nothing")
    enter(page, "generate-class", "3")
    page.locator("#generate-start").click()
    page.locator("#generate-first-facts dl").wait_for()
    runtime = choose_runtime(served.out / "by-hand").name
    assert f"runtime {runtime}" in page.locator("#generate-first-facts").inner_text()
    page.get_by_role("tab", name="Edit").click()
    choose(page, "edit-model", "made/by-hand")
    upload(page, photo())
    use_box(page, 0.5)
    page.locator("#edit-start").click()
    page.locator("#edit-download").wait_for()


def test_a_calibration_is_stopped_by_its_button_and_seen_by_another_page(
    open_page: Callable[..., Any], served: Any
) -> None:
    page = open_page("Quantize")
    choose(page, "quantize-model", SMALL)
    choose(page, "quantize-calibration", "default: ")
    page.get_by_role("button", name="Single settings").click()
    page.locator("#q-samples input").fill("2")
    page.locator("#q-steps input").fill("20000")
    page.locator("#quantize-name textarea, #quantize-name input").fill("never")
    page.locator("#quantize-start").click()
    page.locator("#quantize-status progress").wait_for()
    page.locator("#queue li").filter(has_text="sas w4a4, running").wait_for()
    other = open_page("Quantize", PHONE)
    other.locator("#quantize-status progress").wait_for()
    other.locator("#quantize-curves figure").first.wait_for()
    shoot(other, "quantize-390")
    other.locator("#quantize-stop").click()
    for shown in (other, page):
        shown.locator("#quantize-status .stopped").wait_for()
        shown.locator("#quantize-start:enabled").wait_for()
    assert not (served.out / "never").exists()


def test_measure_and_read_the_report(open_page: Callable[..., Any], artifact: None) -> None:
    page = open_page("Results")
    choose(page, "results-model", DEMO_ARTIFACT)
    page.locator("#results-count input").fill("2")
    page.locator("#results-start").click()
    frame = page.frame_locator("#results-page iframe")
    frame.get_by_role("heading", name="Quality").wait_for()
    assert "demo w4a4" in frame.locator("h1").inner_text()
    assert fits(page)
    shoot(page, "results-1280")
    with page.expect_download() as download:
        page.locator("#results-download").click()
    assert download.value.suggested_filename == "report.html"


def test_analyze_and_see_which_tensor_costs_what(open_page: Callable[..., Any]) -> None:
    page = open_page("Results")
    page.get_by_label("Analyze").check()
    page.locator("#results-count input").fill("1")
    choose(page, "results-model", MADE)
    page.locator("#results-start").click()
    said(page, f"model {MADE}: its float model 'tiny' is not here")
    choose(page, "results-model", SMALL)
    page.locator("#results-start").click()
    page.locator("#results-page img").first.wait_for()
    assert "nats per token" in page.locator("#results-page dl").inner_text()
    broken = "images => images.filter(i => !i.naturalWidth).length"
    assert page.locator("#results-page img").evaluate_all(broken) == 0
    assert fits(page)
    shoot(page, "analysis-1280")
    with page.expect_download() as download:
        page.locator("#results-download").click()
    assert download.value.suggested_filename == "analysis.json"
    phone = open_page("Results", PHONE)
    choose(phone, "results-report", "made/reports/models-small-var.safetensors-analysis")
    phone.locator("#results-page img").first.wait_for()
    assert fits(phone)
    shoot(phone, "analysis-390")
