"""The suggestion: prices against accounts of real models, a greedy written out, planted errors."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varptq.analyze.bench import FLOAT, Bench, Site, spec_of, with_specs
from varptq.analyze.sensitivity import sensitivities, spec_at
from varptq.analyze.suggest import (
    Budget,
    Candidate,
    Prices,
    candidates,
    choose,
    raised_config,
    suggest,
)
from varptq.artifact.sizes import sizes, total
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.convert import check_rules, convert
from varptq.quant.describe import bops_account

W4A4 = QuantConfig.preset("w4a4+paper")
UNITS = ("bytes", "bops")
SIDES = ("weight", "input")


@pytest.fixture(scope="module")
def prices(tiny: Pipeline) -> Prices:
    return Prices(tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    ["w4a4+paper", "w6a8+paper+litevar", "w4a4+paper+released", "w4a4+paper+center+rotate"],
)
def test_prices_are_those_of_the_converted_model(preset: str, any_tiny: Pipeline) -> None:
    config, prices = QuantConfig.preset(preset), Prices(any_tiny)
    site = Site("blocks.1.ffn.fc1", "weight")
    for changed in (config, with_specs(config, {site: spec_at(config, site, 8)}), FLOAT):
        model = convert(any_tiny.var, changed)
        kinds = sizes(dataclasses.replace(any_tiny, var=model))
        kinds.pop("vae")
        assert prices.bytes(changed) == total(kinds).bytes
        assert prices.bops(changed) == bops_account(model, changed).total


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_a_suggestion_is_a_config_that_costs_and_loses_what_it_says(
    unit: str, tiny: Pipeline, bench: Bench, prices: Prices
) -> None:
    budget = Budget("bytes", 1.3) if unit == "bytes" else Budget("bops", 1.3)
    found = suggest(bench, W4A4, sensitivities(bench, W4A4, (8, 4)), budget)
    base = prices.of(W4A4, unit)
    assert (found.price, found.limit) == (base, int(1.3 * base))
    assert base < found.picks[-1].price == prices.of(found.config, unit) <= found.limit
    assert bench.kl(found.config) == found.picks[-1].divergence
    assert found.picks[-1].divergence.kl < found.base.kl == bench.kl(W4A4).kl
    if unit == "bytes":
        assert {pick.candidate.site.operand for pick in found.picks} == {"weight"}
    check_rules(tiny.var, found.config)
    assert QuantConfig.from_dict(found.config.to_dict()) == found.config


def greedy(
    config: QuantConfig, left: list[Candidate], prices: Prices, unit: str, limit: int
) -> list[Site]:
    """Look at every candidate in every round."""
    chosen: list[Candidate] = []
    while True:
        now = prices.of(raised_config(config, chosen), unit)
        rates: list[tuple[float, int]] = []
        for index, candidate in enumerate(left):
            price = prices.of(raised_config(config, [*chosen, candidate]), unit)
            if candidate not in chosen and price <= limit:
                rate = candidate.gain / (price - now) if price > now else float("inf")
                rates.append((rate, -index))
        if not rates:
            return [candidate.site for candidate in chosen]
        chosen.append(left[-max(rates)[1]])


# Partners in one product: raising one makes the other dearer.
PARTNERS = [
    *(Site(f"blocks.0.{layer}", side) for layer in ("attn.proj", "ffn.fc1") for side in SIDES),
    *(Site("blocks.1.attn", operand) for operand in ("query", "key", "probability", "value")),
]


@settings(max_examples=20)
@given(data=st.data(), unit=st.sampled_from(UNITS), ratio=st.floats(1.0, 2.0))
@pytest.mark.slow
def test_the_choice_is_that_of_a_greedy_that_looks_at_everything(
    data: st.DataObject, unit: str, ratio: float, tiny: Pipeline, prices: Prices
) -> None:
    config = QuantConfig.preset(
        data.draw(st.sampled_from(["w4a4+paper", "w8a4+paper", "w2a8+paper", "w8a8+paper"]))
    )
    base = prices.of(config, unit)
    allowed = [site for site in PARTNERS if unit == "bops" or site.operand == "weight"]
    some = data.draw(st.lists(st.sampled_from(allowed), min_size=1, max_size=5, unique=True))
    left: list[Candidate] = []
    for site in some:
        kind = "uniform" if site.operand == "probability" else None
        spec = spec_at(config, site, 8, kind)
        # Gains per cost near each other, so that a dearer partner changes the order.
        cost = prices.of(with_specs(config, {site: spec}), unit) - base
        rate = data.draw(st.integers(1, 6))
        left.append(Candidate(site, spec, rate * max(cost, 1) / 1e6))
    limit = int(ratio * base)
    chosen = choose(config, left, prices, unit, limit)
    assert [candidate.site for candidate in chosen] == greedy(config, left, prices, unit, limit)


def test_a_planted_error_is_found_first(bench: Bench) -> None:
    culprit = Site("blocks.1.attn.proj", "input")
    config = with_specs(QuantConfig.preset("w8a8+paper+p8"), {culprit: spec_at(W4A4, culprit, 2)})
    found = suggest(bench, config, [], Budget("bops", 1.5))
    assert [pick.candidate.site for pick in found.picks] == [culprit]
    assert found.picks[0].divergence.kl < found.base.kl / 10


def test_better_rules_that_cost_nothing_fit_any_budget(bench: Bench) -> None:
    found = suggest(bench, QuantConfig.preset("w8a8+paper"), [], Budget("bops", 1.0))
    assert {pick.candidate.site.operand for pick in found.picks} == {"probability"}
    assert all(pick.price == found.price for pick in found.picks)
    assert found.picks[-1].divergence.kl < found.base.kl


def test_float_and_eight_bit_tensors_are_no_candidates(bench: Bench) -> None:
    found = candidates(bench, QuantConfig.preset("w4a8+paper+p8+litevar"), [], "bops")
    assert found and {candidate.site.operand for candidate in found} == {"weight"}
    assert not any("fc2" in candidate.site.layer for candidate in found)
    assert candidates(bench, QuantConfig.preset("w8a4+paper"), [], "bytes") == []


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget("bops", 0.9), "budget 0.9: expected a ratio"),
        (Budget("bytes", float("nan")), "budget nan: expected a ratio"),
        (Budget("bops", float("inf")), "budget inf: expected a ratio"),
        (Budget("bytes", None, 1000), "budget 1.0 kB: the config itself takes"),
    ],
)
def test_a_budget_below_the_config_is_refused(budget: Budget, message: str, bench: Bench) -> None:
    with pytest.raises(InputError, match=message):
        suggest(bench, W4A4, [], budget)


def test_a_size_is_a_limit_in_bytes(bench: Bench, prices: Prices) -> None:
    base = prices.bytes(W4A4)
    found = suggest(bench, W4A4, [], Budget("bytes", None, base))
    assert (found.limit, found.picks, spec_of(found.config, Site("head", "weight"))) == (
        base,
        (),
        spec_of(W4A4, Site("head", "weight")),
    )
