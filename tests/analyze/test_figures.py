"""Pictures: that values reach the pixels, and that documents of any depth can be drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from varptq.analyze.analyze import AnalysisConfig, analyze
from varptq.analyze.charts import (
    DENSITY,
    EMPTY,
    PALETTE,
    Bar,
    Curves,
    HeatMap,
    bars,
    linear_ticks,
    log_share,
    log_ticks,
    number,
    ramp,
    stacked,
)
from varptq.analyze.figures import figures
from varptq.analyze.suggest import Budget
from varptq.errors import ConfigError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig


def pixels(picture: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """(H, W) bool: where the picture has exactly this colour."""
    return (np.asarray(picture) == np.array(color)).all(-1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4e-5, "4e-5"), (0.0013, ".0013"), (0.089, ".089"), (1.25, "1.2"), (12.3, "12")],
)
def test_a_number_is_short(value: float, text: str) -> None:
    assert number(value) == text


@given(low=st.floats(1e-9, 1e3), factor=st.floats(1, 1e7))
def test_log_ticks_hold_the_values(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(set(ticks)) and len(ticks) >= 2
    assert ticks[0] <= low * 1.001 and low * factor <= ticks[-1] * 1.001


@given(high=st.floats(1e-6, 1e6))
def test_linear_ticks_start_at_zero_and_hold_the_values(high: float) -> None:
    ticks = linear_ticks(high)
    steps = np.diff(ticks)
    assert ticks[0] == 0 and high <= ticks[-1] * 1.001
    assert 3 <= len(ticks) <= 8 and np.allclose(steps, steps[0])


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bar("one", 4.0, 0), Bar("other", 1.0, 1), Bar("nothing", 0.0, 2)]
    picture = bars("title", rows, ["a", "b", "c"])
    lengths = [pixels(picture, color).sum(1).max() for color in PALETTE[:2]]
    assert lengths[0] / lengths[1] == pytest.approx(4, rel=0.02)
    # Of the third series there is the legend alone.
    assert pixels(picture, PALETTE[2]).sum() == (10 * DENSITY) ** 2


def test_a_heat_map_darkens_with_the_value_and_leaves_gaps() -> None:
    share = log_share(1e-4, 1.0)
    cells = [[1e-4, 1e-2, 1.0], [None, 1e-2]]
    picture = HeatMap("", cells, ["a", "b"], ["0", "1", "2"], share, lambda _: "").draw()
    areas = [pixels(picture, ramp(share(value))).sum() for value in (1e-4, 1e-2, 1.0)]
    assert areas[1] == 2 * areas[2] == 2 * areas[0] == 2 * pixels(picture, EMPTY).sum() > 0


@pytest.mark.parametrize("log", [False, True])
def test_curves_rise_where_the_values_do(log: bool) -> None:
    points = {"series": [(1.0, 0.01), (2.0, 0.1), (3.0, 1.0)], "other": [(1.0, 0.0)]}
    ticks = [(1.0, "1"), (3.0, "3")]
    picture = Curves("", points, ticks, "x", "y", log).draw()
    found = pixels(picture, PALETTE[0])
    legend_end = 70 * DENSITY
    columns = np.flatnonzero(found[legend_end:].any(0))
    heights = [np.flatnonzero(found[legend_end:, x])[0] for x in (columns[4], columns[-5])]
    assert heights[0] > heights[1]


@given(low=st.floats(1e-9, 1e3), factor=st.floats(1.1, 1e7), power=st.floats(0, 1))
def test_colours_are_logarithmic(low: float, factor: float, power: float) -> None:
    share = log_share(low, low * factor)
    assert share(low * factor**power) == pytest.approx(power, abs=1e-6)
    assert share(low / 2) == 0
    assert log_share(low, low)(low) == 0


def test_pages_keep_every_picture() -> None:
    parts = [Image.new("RGB", (w, h), (w, h, 0)) for w, h in ((10, 20), (30, 5), (7, 7))]
    page = stacked(parts, across=2)
    assert page.size == (40, 27)
    assert all(pixels(page, (p.width, p.height, 0)).sum() == p.width * p.height for p in parts)


@pytest.fixture(scope="module")
def document(tiny: Pipeline) -> dict[str, Any]:
    settings = AnalysisConfig(images=2, widths=(4, 8))
    budget = Budget("bops", 1.2)
    return analyze(
        tiny, QuantConfig.preset("w4a4+paper"), budget=budget, settings=settings
    ).document


@pytest.mark.slow
def test_the_document_holds_every_tensor_and_sums_that_fit(document: dict[str, Any]) -> None:
    rows = document["tensors"]
    assert document["settings"]["widths"] == [8, 4]
    assert len(rows) == 2 * (2 * 5 + 4 + 1) + 2 * 3
    kls = [row["alone"]["4"]["kl"] for row in rows]
    assert kls == sorted(kls, reverse=True)
    found = document["suggestion"]
    assert found["bops"] == found["picks"][-1]["price"] <= found["limit"]
    assert found["verified"]["mixed"]["kl"] < found["verified"]["base"]["kl"]
    raised = {(pick["layer"], pick["operand"]) for pick in found["picks"]}
    assert {(r["layer"], r["operand"]) for r in found["bits"] if r["bits"] == 8} == raised
    errors = document["product_errors"]
    assert errors["both"][0][2] > max(errors["values"][0][2], errors["probabilities"][0][2])
    weights = zip((1, 4, 9), document["base"]["kl_per_scale"], strict=True)
    total = sum(count * kl for count, kl in weights) / 14
    assert math.isclose(total, document["base"]["kl"], rel_tol=1e-12)


@pytest.mark.slow
def test_figures_of_a_shallow_and_a_deep_model(document: dict[str, Any]) -> None:
    deep = [
        {**row, "block": block, "layer": row["layer"].replace("blocks.0", f"blocks.{block}")}
        for row in document["tensors"]
        if row["block"] == 0
        for block in range(30)
    ]
    for rows in (document["tensors"], deep):
        for name, picture in figures({**document, "tensors": rows}).items():
            assert name.endswith(".png")
            assert min(picture.size) > 200 and max(picture.size) < 6000
            corner = np.asarray(picture)[:4, :4]
            assert (corner == 255).all() and (np.asarray(picture) < 200).any()


@pytest.mark.parametrize("widths", [(), (1,), (4, 9)])
def test_widths_out_of_range_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="widths"):
        AnalysisConfig(widths=widths)
