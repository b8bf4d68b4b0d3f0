"""The frontier: every assignment written out, prices against accounts of whole configs, and the
verb from measurement to calibrated models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.analyze.analyze import AnalysisConfig
from varptq.analyze.bench import Bench
from varptq.analyze.budgets import Limit, budgets
from varptq.analyze.frontier import (
    INPUTS,
    SCHEME,
    UNITS,
    WEIGHTS,
    Frontier,
    Kind,
    Option,
    Point,
    assigned,
    frontier,
    joined,
    rounded_weights,
    unbeaten,
    unsmoothed,
)
from varptq.analyze.suggest import Prices
from varptq.calibrate.config import CalibrationConfig
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.convert import check_rules

CONFIG = unsmoothed(QuantConfig.preset(SCHEME))
FAST = CalibrationConfig(num_samples=2, rounding="gptq")
START = Point((), 0.0, 100, 100)

sizes = st.integers(0, 6)
options = st.lists(
    st.builds(Option, st.tuples(sizes, sizes), sizes.map(float), sizes, sizes),
    min_size=1,
    max_size=4,
)


def beaten(point: Point, every: list[Point], units: tuple[str, ...]) -> bool:
    def prices(p: Point) -> list[float]:
        return [p.kl, *(getattr(p, unit) for unit in units)]

    mine = prices(point)
    return any(
        all(a <= b for a, b in zip(prices(p), mine, strict=True)) and prices(p) != mine
        for p in every
    )


@settings(max_examples=200)
@given(st.lists(options, min_size=1, max_size=4), st.sampled_from([("bops",), ("bytes",), UNITS]))
def test_joining_keeps_what_no_assignment_beats(
    kinds: list[list[Option]], units: tuple[str, ...]
) -> None:
    """Against every assignment there is."""
    every = [
        Point(
            tuple(o.bits for o in chosen),
            sum(o.kl for o in chosen),
            100 + sum(o.bops for o in chosen),
            100 + sum(o.bytes for o in chosen),
        )
        for chosen in product(*kinds)
    ]

    def prices(points: list[Point]) -> list[tuple[float, ...]]:
        return [(p.kl, *(getattr(p, unit) for unit in units)) for p in points]

    found = prices(joined(kinds, START, units))
    best = prices([p for p in every if not beaten(p, every, units)])
    assert sorted(found) == sorted(set(best)) and found == sorted(found)


def test_the_best_within_a_budget_and_none_that_fits() -> None:
    points = [Point(((2, 4),), kl, bops, size) for kl, bops, size in ((0.1, 9, 5), (0.2, 4, 8))]
    found = Frontier((Kind("x", False),), CONFIG, tuple(unbeaten(points)), {})
    assert found.best(bops=9, bytes=None).kl == 0.1
    assert found.best(bops=8, bytes=None).kl == 0.2
    assert found.best(bops=None, bytes=5).kl == 0.1
    with pytest.raises(InputError, match=r"^budget: no choice of bits fits 3 bops \(least 4\)"):
        found.best(bops=3, bytes=None)
    with pytest.raises(InputError, match=r"8 bops \(least 4\) and 5 bytes \(least 5\); give more"):
        found.best(bops=8, bytes=5)


@pytest.fixture(scope="module")
def rounded(tiny: Pipeline) -> dict[int, dict[str, Tensor]]:
    return rounded_weights(tiny, CONFIG, FAST)


@pytest.fixture(scope="module")
def found(bench: Bench, rounded: dict[int, dict[str, Tensor]]) -> Frontier:
    return frontier(bench, CONFIG, rounded)


@pytest.mark.slow
def test_kinds_are_layers_of_all_blocks_but_those_kept_at_8_bits(found: Frontier) -> None:
    names = [kind.layers for kind in found.kinds]
    assert "word_embed" not in names
    assert {"blocks.*.attn.proj", "blocks.*.attn", "blocks.*.ffn.fc2", "head"} <= set(names)
    assert [kind.layers for kind in found.kinds if kind.attention] == ["blocks.*.attn"]


@pytest.mark.slow
def test_prices_are_those_of_the_whole_config(
    found: Frontier, tiny: Pipeline, bench: Bench
) -> None:
    prices = Prices(tiny)
    for point in found.points[:: max(1, len(found.points) // 6)]:
        config = found.config(point, "chosen")
        check_rules(bench.source.var, config)
        assert (prices.bops(config), prices.bytes(config)) == (point.bops, point.bytes)


@pytest.mark.slow
def test_more_bits_never_cost_quality_and_rounding_knows_its_width(found: Frontier) -> None:
    """Each side's KL falls with its bits, within what three images allow."""
    for kind, options in found.costs.items():
        if kind.attention:
            continue
        kls = {option.bits: option.kl for option in options}
        for x in INPUTS:
            falling = [kls[w, x] for w in WEIGHTS]
            assert all(a > 0.9 * b for a, b in pairwise(falling)), kind
        assert kls[2, 4] > kls[8, 8]


@pytest.mark.slow
def test_weights_are_measured_with_the_codes_they_are_given(
    bench: Bench, rounded: dict[int, dict[str, Tensor]]
) -> None:
    """Codes of zeros are far worse than those of GPTQ."""
    kind = Kind("blocks.*.ffn.fc1", False)
    config = assigned(CONFIG, {kind: (4, 8)}).replace(attention=None)
    codes = rounded[4]
    spoiled = {n: torch.zeros_like(t) if n.endswith("codes") else t for n, t in codes.items()}
    assert bench.kl(config, rounded=spoiled).kl > 1.5 * bench.kl(config, rounded=codes).kl


@pytest.mark.slow
def test_a_budget_is_kept_and_judged(make_tiny: Callable[..., Pipeline]) -> None:
    pipe, limits = make_tiny(depth=1), [Limit(bops=1.0), Limit(bops=1.3, size=1.2)]
    answer = budgets(pipe, limits, calibration=FAST, settings=AnalysisConfig(images=2))
    prices, base = Prices(pipe), QuantConfig.preset("w4a4+paper")
    chosen = answer.document["chosen"]
    assert list(chosen) == list(answer.configs) == ["bops1", "bops1.3-size1.2"]
    for name, config in answer.configs.items():
        assert config.linear.input_transform is not None and config.linear.input_transform.smooth
        ratio = prices.bops(config) / prices.bops(base)
        assert ratio <= float(name.split("-")[0].removeprefix("bops"))
        assert ratio == pytest.approx(chosen[name]["bops"], rel=1e-9)
        assert chosen[name]["measured"] > 0
    assert prices.bytes(answer.configs["bops1.3-size1.2"]) <= 1.2 * prices.bytes(base)
    assert chosen["bops1.3-size1.2"]["kl"] <= chosen["bops1"]["kl"]
