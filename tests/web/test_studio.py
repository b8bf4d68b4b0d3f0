"""The studio in a real browser: every tab used as a person would, at a desk and on a phone.

Pictures of the pages go to out/studio. At the end of every test no request has left the machine and
no page has complained. The tab Edit is in test_studio_edit.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from helpers.studio_pages import (
    DEMO_ARTIFACT,
    DESK,
    IN_BROWSER,
    MADE,
    PHONE,
    SMALL,
    choose,
    downloaded,
    enter,
    fits,
    said,
    shoot,
    tab_to,
    turn,
)
from varptq.runtime.load import choose as choose_runtime

# What the button of each tab says.
TABS = {"Generate": "Generate", "Edit": "Edit", "Quantize": "Quantize", "Results": "Measure"}

pytestmark = IN_BROWSER


def is_dark(page: Any) -> bool:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(map(int, re.findall(r"\d+", colour)[:3])) < 80


def test_two_models_draw_side_by_side_and_scale_by_scale(
    open_page: Callable[..., Any], served: Any, artifact: None
) -> None:
    page = open_page("Generate")
    choose(page, "generate-beside", DEMO_ARTIFACT)
    choose(page, "generate-class", "ship")
    page.locator("#generate-start").click()
    for panel in ("first", "second"):
        page.locator(f"#generate-{panel}-facts dl").wait_for()
        page.locator(f"#generate-{panel} img").nth(3).wait_for()
        page.locator(f"#generate-{panel}-scales img").nth(5).wait_for()
        facts = page.locator(f"#generate-{panel}-facts").inner_text()
        assert all(word in facts for word in ("Time", "Memory", "Bits"))
        assert page.locator(f"#generate-{panel} img").count() == 4
        assert page.locator(f"#generate-{panel}-scales img").count() == 6
    facts = page.locator("#generate-second-facts").inner_text()
    assert "w4a4" in facts and f"runtime {choose_runtime(served.out / 'demo-w4a4').name}" in facts
    for size, scheme in ((DESK, "light"), (PHONE, "dark")):
        turn(page, size, scheme)
        assert fits(page)
        assert is_dark(page) is (scheme == "dark")
        shoot(page, f"generate-{size[0]}-{scheme}")


def test_a_picture_is_downloaded_by_class_and_seed_and_a_click_enlarges_it(
    open_page: Callable[..., Any],
) -> None:
    page = open_page("Generate", PHONE)
    choose(page, "generate-beside", "nothing")
    choose(page, "generate-class", "ship")
    page.locator("#generate-start").click()
    page.locator("#generate-first-download").wait_for()
    first = downloaded(page, "generate-first-download")
    assert first.suggested_filename == "ship-seed0-0.png"
    picture = page.locator("#generate-first .grid-wrap img").nth(2)
    before = picture.bounding_box()
    picture.click()
    large = page.locator("#generate-first img[data-testid=detailed-image]")
    large.wait_for()
    assert large.bounding_box()["height"] > 1.5 * before["height"]
    page.locator("#generate-first-download").filter(has_text="ship-seed0-2.png").wait_for()
    chosen = downloaded(page, "generate-first-download")
    assert chosen.suggested_filename == "ship-seed0-2.png"
    assert chosen.path().read_bytes() != first.path().read_bytes()
    with page.expect_download() as download:
        page.locator("#generate-first").get_by_label("Download").click()
    assert download.value.suggested_filename == "ship-seed0-2.png"
    for size in (PHONE, DESK):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        assert fits(page)
        shoot(page, f"generate-large-{size[0]}")


def test_every_tab_fits_a_phone_and_says_what_its_buttons_do(
    open_page: Callable[..., Any],
) -> None:
    page = open_page("Generate", PHONE, "dark")
    assert is_dark(page)
    page.wait_for_timeout(1000)  # what the page asks for when it is opened has come
    for tab, word in TABS.items():
        page.get_by_role("tab", name=tab).click()
        start, stop = (page.locator(f"#{tab.lower()}-{which}") for which in ("start", "stop"))
        start.wait_for()
        page.wait_for_timeout(500)  # and what the tab asks for
        assert (start.inner_text(), stop.inner_text()) == (word, "Stop")
        for scheme in ("light", "dark"):
            turn(page, PHONE, scheme)
            assert fits(page)
            shoot(page, f"{tab.lower()}-empty-390-{scheme}")


def test_the_keyboard_comes_to_every_button(open_page: Callable[..., Any]) -> None:
    page = open_page("Generate")
    for name in TABS:
        tab = page.get_by_role("tab", name=name)
        tab.click()
        page.locator(f"#{name.lower()}-start").wait_for()
        tab.focus()
        tab_to(page, f"{name.lower()}-start")


def test_the_keyboard_alone_is_enough_to_draw_and_a_mistake_is_answered(
    open_page: Callable[..., Any],
) -> None:
    page = open_page("Generate")
    choose(page, "generate-model", MADE)
    choose(page, "generate-beside", "nothing")
    enter(page, "generate-class", "3")
    tab_to(page, "generate-start")
    page.keyboard.press("Enter")
    page.locator("#generate-first-facts dl").wait_for()
    page.locator("#generate-start:enabled").wait_for()
    enter(page, "generate-class", "kat")
    page.locator("#generate-start").click()
    said(page, "class 'kat': unknown; did you mean cat, ant?")
    shoot(page, "toast-1280")
    enter(page, "generate-class", "<b>&lt;script&gt;</b>")
    page.locator("#generate-start").click()
    said(page, "class '<b>&lt;script&gt;</b>': unknown")
    # The button is ready for the next try.
    page.locator("#generate-start:enabled").wait_for()


def test_a_choice_stays_that_was_made_while_the_lists_were_on_their_way(
    open_page: Callable[..., Any],
) -> None:
    page = open_page("Results")
    page.wait_for_timeout(1500)  # what the page asks for when it is opened has come
    asked: list[Any] = []
    page.route("**/queue/join*", lambda route: asked.append(route))
    page.get_by_role("tab", name="Generate").click()
    choose(page, "generate-model", MADE)
    choose(page, "generate-beside", SMALL)
    assert ["demo", "nothing"] in [route.request.post_data_json["data"][:2] for route in asked]
    for route in asked:
        route.continue_()
    page.unroute("**/queue/join*")
    page.wait_for_timeout(1500)
    pickers = [page.locator(f"#generate-{picker} input") for picker in ("model", "beside")]
    assert [picker.input_value() for picker in pickers] == [MADE, SMALL]


def test_quantize_with_a_tiny_setting(
    open_page: Callable[..., Any], served: Any, tmp_path: Path
) -> None:
    page = open_page("Quantize")
    choose(page, "quantize-model", SMALL)
    page.get_by_label("brecq").check()
    choose(page, "quantize-calibration", "default: ")
    page.get_by_role("button", name="Single settings").click()
    page.locator("#q-samples input").fill("2")
    page.locator("#q-steps input").fill("6")
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


def test_a_calibration_is_stopped_by_its_button_and_seen_by_another_page(
    open_page: Callable[..., Any], served: Any
) -> None:
    page = open_page("Quantize")
    choose(page, "quantize-model", SMALL)
    choose(page, "quantize-config", "w8a8")
    choose(page, "quantize-calibration", "default: ")
    page.get_by_role("button", name="Single settings").click()
    page.locator("#q-samples input").fill("2")
    page.locator("#q-steps input").fill("3000")  # ends by itself where the button is missed
    page.locator("#quantize-name textarea, #quantize-name input").fill("never")
    page.locator("#quantize-start").click()
    page.locator("#quantize-status progress").wait_for()
    page.locator("#queue li").filter(has_text="brecq w8a8, running").wait_for()
    other = open_page("Quantize", PHONE)
    other.locator("#quantize-status progress").wait_for()
    other.locator("#quantize-curves figure").first.wait_for()
    for shown in (other, page):
        plan = shown.locator("#quantize-plan")
        plan.scroll_into_view_if_needed()
        foretold = plan.inner_text()
        assert "brecq, 2 images, up to 3000 steps" in foretold
        assert "here" in foretold and "MB" in foretold
        assert "Will run on" in shown.locator("#quantize-summary").inner_text()
        assert fits(shown)
    shoot(page, "quantize-foretold-1280")
    shoot(other, "quantize-390")
    other.locator("#quantize-stop").click()
    for shown in (other, page):
        shown.locator("#quantize-status .stopped").wait_for()
        shown.locator("#quantize-start:enabled").wait_for()
        shown.locator("#quantize-curves figure").first.wait_for()
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
    said(page, f"model {MADE}: its float model 'tiny' is missing")
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
