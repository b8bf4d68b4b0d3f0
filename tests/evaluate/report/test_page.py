"""The report: well-formed, self-contained, safe against hostile names, readable in a browser."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.studio_pages import STUDIO
from varptq.evaluate.catalogue import METRICS, NEEDS
from varptq.evaluate.report import choose_pairs, render, write_report
from varptq.evaluate.report.charts import HEIGHT, Axis, Series, cloud, curves
from varptq.evaluate.report.gallery import MAX_BYTES, MAX_PAIRS, Pair, gallery
from varptq.evaluate.report.markup import Markup, element
from varptq.evaluate.sampling import SampleSet, sample_set
from varptq.models.pipeline import Pipeline

VOID = {"meta", "img"}
HOSTILE = '<script>alert("1")</script>&amp;'
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def document(**changes: Any) -> dict[str, Any]:
    """A document with every field, as `varptq evaluate` writes it."""
    values = dict.fromkeys(METRICS, 0.5)
    kinds = {"mat_qkv": 4, "head": 4, "float parts": 32, "vae": 32}
    sizes = {
        kind: {"elements": 800, "bytes": 100 * b, "grid_bytes": 9, "float32_bytes": 3200}
        for kind, b in kinds.items()
    }
    copies = [
        {"block": b, "scale": k, "keys": n, "duplicated": n / (b + k + 1), "mean_copies": 1.5}
        for b in range(3)
        for k, n in enumerate((1, 5, 14))
    ]
    curve = [0.25, 0.5, 0.75]
    before_after = {"l1_before": 0.5, "l1_after": 0.25}
    return {
        "format_version": 1,
        "title": "tiny w4a4",
        "kind": "quantized",
        "compared_with": "tiny",
        "metrics": values | {"kl": 0.0913, "is_std": 0.07},
        "float_metrics": {"fid": 3.25, "is": 9.5},
        "left_out": {},
        "warnings": ["images: sorted by label"],
        "per_scale": {
            "sides": [1, 2, 3],
            **dict.fromkeys(("kl", "kl_filtered", "top1", "token_agreement"), curve),
        },
        "codebook": {"counts": [3, 0, 1, 6], "float_counts": [2, 2, 0, 6], "distance": 0.4},
        "settings": {
            "count": 12,
            "seed": 7,
            "sampling": {"cfg": 4.0, "top_k": 100, "more_smooth": False},
            "token_images": 12,
            "network": None,
        },
        "checksums": {"model": "0" * 64},
        "versions": {"varptq": "1.2.3"},
        "machine": dict.fromkeys(("device", "system", "threads", "dtype", "runtime"), "cpu"),
        "model": {
            "method": "sas",
            "seed": 0,
            "config": {"name": "w4a4"},
            "calibration": {"steps": 3},
            "sizes": {"transformer": sizes["mat_qkv"], "kinds": sizes},
            "bits": {
                "mat_qkv": {"weight": "4 bits, per channel", "input": "8 bits"},
                "attention": {"query": "4 bits"},
            },
            "bops": {"total": 300, "float_total": 4800, "by_kind": {"fc1": 200, "head": 100}},
            "theta": {"value": 0.0166, "fraction": 0.009, "alpha": 0.01},
            "copies": copies,
            "resampling": {"moved": 9, "scales": [before_after] * 3},
        },
        **changes,
    }


def pairs(count: int = 6) -> list[Pair]:
    return [Pair(f"class {i}", PIXELS, 255 - PIXELS, i / count) for i in range(count)]


class Checker(HTMLParser):
    """Tags in order, texts, and whether every tag is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def anchors(self) -> list[str | None]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def test_copies_of_texts_are_drawn_beside_those_of_tokens() -> None:
    model = document()["model"]
    tokens = Checker(render(document()))
    assert tokens.text.count("Tokens duplicated") == 1 and "of the text" not in tokens.text
    text_copies = [{**copy, "keys": 77, "duplicated": 6.25} for copy in model["copies"]]
    both = Checker(render(document(model={**model, "text_copies": text_copies})))
    assert "Tokens of the text duplicated" in both.text and "Tokens duplicated" in both.text
    hints = [text for text in both.texts if "tokens of the text" in text]
    assert "block 2: 6.2 of 77 tokens of the text, 1.50 copies each on average" in hints
    assert hints.count("77 tokens of the text") == len(document()["per_scale"]["sides"])


EVERYTHING = ["quality", "images", "scales", "codebook", "size", "bops", "theta", "provenance"]


def test_everything_is_on_the_page_in_order() -> None:
    page = Checker(render(document(), pairs()))
    assert page.anchors == EVERYTHING
    for metric in METRICS.values():
        assert metric.title in page.text and metric.sentence in page.text
    for word in (
        *("0.0913 nats", "50.0%", "0.50 ± 0.07", "9.50", "images: sorted by label"),
        *("class 5", "83%", "8.00× smaller", "16.0× fewer", "4 bits, per channel", "query 4 bits"),
        *("θ = 0.0166", "0.90%", "9 calibration tokens", "0" * 64, "cfg 4.0, top-k 100", "1.2.3"),
        "3 of 4 entries were drawn, 3 by the float model",
    ):
        assert word in page.text, word


def test_parts_that_were_not_measured_do_not_appear() -> None:
    bare = document(
        compared_with=None,
        metrics={"is": 9.5},
        float_metrics={},
        left_out={"kl": NEEDS["pair"], "top1": NEEDS["pair"]},
        per_scale={"sides": [1, 2, 3]},
        codebook={"counts": [3, 0, 1, 6]},
        warnings=[],
    )
    del bare["model"]
    page = Checker(render(bare))
    assert page.anchors == ["quality", "codebook", "provenance"]
    assert "KL divergence, Top-1 agreement would need the float model" in page.text
    assert "float model;" not in page.text
    model = document()["model"]
    off = Checker(render(document(model={**model, "theta": {"value": None}, "copies": []})))
    assert "Off: no value token is duplicated" in off.text
    del model["theta"], model["method"]
    floats = Checker(render(document(model={**model, "copies": [], "resampling": None})))
    assert "theta" not in floats.anchors


def test_a_distance_on_another_network_says_so() -> None:
    settings = document()["settings"]
    for network, word in (("inception", "FID ↓"), ("resnet56", "FID (resnet56) ↓")):
        page = Checker(render(document(settings={**settings, "network": network})))
        assert word in re.sub(r"\s+", " ", page.text)
        assert "PSNR ↑" in re.sub(r"\s+", " ", page.text)


def test_equal_images_have_no_number() -> None:
    page = Checker(render(document(metrics={"psnr": None})))
    assert "identical" in page.text


def test_the_page_asks_nothing_of_anyone() -> None:
    text = render(document(), pairs())
    page = Checker(text)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("src", "href"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import", text)
    policy = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy and str(policy[0]).startswith("default-src 'none'")


def test_names_of_other_people_are_only_text() -> None:
    changed = document(title=HOSTILE, compared_with=HOSTILE, warnings=[HOSTILE])
    changed["model"]["method"] = changed["machine"]["device"] = HOSTILE
    changed["model"]["config"] = {HOSTILE: HOSTILE}
    changed["model"]["bits"]["mat_qkv"]["weight"] = HOSTILE
    page = Checker(render(changed, [Pair(HOSTILE, PIXELS, PIXELS, 0.5)]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) >= 7


@given(st.text(), st.text())
def test_elements_escape_what_they_are_given(content: str, value: str) -> None:
    line = element("p", content, title=value)
    assert line.count("<") == 2 and line.count(">") == 2 and line.count('"') == 2
    assert element("p", Markup("<b>x</b>"), hidden=None) == "<p><b>x</b></p>"


@given(st.floats(1e-6, 1e6))
def test_a_linear_axis_covers_its_values_in_round_steps(top: float) -> None:
    ticks = Axis.linear(top).ticks
    step = ticks[1] - ticks[0]
    assert 2 <= len(ticks) <= 6 and ticks[-1] >= top * (1 - 1e-6)
    assert ticks[-1] - step < top
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - round_) for round_ in (1, 2, 5, 10)) < 1e-6


@given(st.floats(1e-6, 1), st.floats(1, 1e3))
def test_a_logarithmic_axis_covers_its_values(low: float, factor: float) -> None:
    axis = Axis.decades(low, low * factor)
    assert axis.ticks[0] <= low * (1 + 1e-9) and axis.ticks[-1] >= low * factor * (1 - 1e-9)
    assert axis.height(axis.ticks[0]) > axis.height(axis.ticks[-1])
    # Nothing was drawn: a count of 0 stands on the floor.
    assert axis.height(0) == axis.height(axis.ticks[0])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=12))
def test_curves_stay_in_the_picture(values: list[float]) -> None:
    axis = Axis.linear(max(values))
    series = [Series("a", values, "float")]
    drawn = Checker(curves(series, [str(i) for i in range(len(values))], axis, str, "x"))
    heights = [float(str(attrs["cy"])) for tag, attrs in drawn.tags if tag == "circle"]
    assert len(heights) == len(values) and all(0 <= y <= HEIGHT for y in heights)
    for a, b, y, z in zip(values, values[1:], heights, heights[1:], strict=False):
        assert (a > b) <= (y <= z)


def test_a_cloud_has_a_dot_for_every_value() -> None:
    points, line = (Series("a", [0.1, 0.0, 0.5], tone) for tone in ("quantized", "float"))
    assert cloud(points, line, Axis.decades(0.01, 0.5), str, "x").count("h0") == 3


@pytest.fixture(scope="module")
def samples(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> SampleSet:
    return sample_set(tiny, tmp_path_factory.mktemp("a"), count=MAX_PAIRS + 3, shard_size=16)


def test_pairs_stand_class_by_class(samples: SampleSet) -> None:
    chosen = choose_pairs(samples, samples, ("ant", "bee", "cat", "dog", "eel"))
    titles = [pair.title for pair in chosen]
    assert titles == sorted(titles) and len(titles) == MAX_PAIRS
    assert {titles.count(name) for name in set(titles)} == {MAX_PAIRS // 5}
    for pair in chosen:
        assert pair.above is not None and (pair.above == pair.image).all() and pair.agreement == 1
    alone = choose_pairs(samples, None, [f"class {label}" for label in range(5)])
    assert alone[0].title == "class 0" and alone[0].above is None
    assert Checker(gallery(alone)).tags[0] == ("div", {"class": "pairs"})


def test_large_pictures_are_fewer(samples: SampleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * 6 * 6 * 3
    monkeypatch.setattr("varptq.evaluate.report.gallery.MAX_BYTES", 3 * size)
    assert len(choose_pairs(samples, samples, "abcde")) == 3
    assert MAX_BYTES // (2 * 256 * 256 * 3) == 12


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, document(title="tiny w4a4+" + "long-" * 12 + "name"), pairs(40))
    return path


OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest('pre, svg');
}).map(e => e.outerHTML.slice(0, 80))"""
CLIPPED = (
    """[...document.querySelectorAll('.x')].filter(e => e.scrollWidth > e.clientWidth + 1).length"""
)


@pytest.mark.web
@STUDIO  # where the browser is
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_wide_and_narrow(browser: Any, page_file: Path, width: int) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("request", lambda request, said=said: said.append(request.url))
        page.goto(page_file.as_uri())
        # The page itself, its pictures, and nothing else.
        assert [url for url in said if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate(CLIPPED) == 0
        assert page.evaluate("[...document.images].every(i => i.naturalWidth == 32)")
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(set(colours)) == 2


CONTRAST = """() => {
  const channel = v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b); };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll('p, th, td, dt, dd, h1, h2, b, figcaption')];
  return Math.min(...texts.map(e => {
    const ink = light(getComputedStyle(e).color);
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); }));
}"""


@pytest.mark.web
@STUDIO  # where the browser is
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, page_file: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(page_file.as_uri())
    # What WCAG asks of text at this size.
    assert page.evaluate(CONTRAST) >= 4.5
    page.close()
