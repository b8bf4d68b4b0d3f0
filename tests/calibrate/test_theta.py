"""The cost curve against brute force, the search around the budget, and the copies it reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.var_oracle import both_rows, trace
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import calibration_set
from varptq.calibrate.theta import (
    AttentionMass,
    copy_stat,
    measure_attention,
    overhead_curve,
    search_theta,
    theta_grid,
)
from varptq.errors import ConfigError, NonFiniteError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_mixes
from varptq.quant.shift_sum import orders

HUGE = 10**15
PAPER, FEW = QuantConfig.preset("w4a4+paper"), CalibrationConfig(num_samples=5)


def masses(seed: int, rows: int = 2, heads: int = 3, scales: int = 3) -> list[AttentionMass]:
    """Random abar of two blocks; keys 1, 5, 14, ... as for sides 1, 2, 3, ..."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for block in range(2):
        keys = 0
        for scale in range(scales):
            keys += (scale + 1) ** 2
            logits = 3 * torch.randn(rows, heads, keys, generator=generator)
            abar = logits.softmax(-1)
            found.append(AttentionMass(block, scale, (scale + 1) ** 2, abar, 64, 4, 6))
    return found


def brute_force(entries: list[AttentionMass], theta: float, max_order: int) -> float:
    """The formula of the module docstring, term by term."""
    total = 0.0
    for entry in entries:
        rows, heads, keys = entry.abar_BHl.shape
        queries, c = entry.num_queries, entry.head_dim
        copies = 2.0 ** orders(entry.abar_BHl, theta, max_order)
        extra = float((copies - 1).sum()) / rows
        total += heads * queries * keys * 16 + heads * keys * 16 + heads * keys * 4
        total += extra * c * 16 + extra * queries
        total += queries * extra * c * entry.probability_bits * entry.value_bits
    return total


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3), st.sampled_from([1, 3, 37]))
def test_curve_equals_brute_force_and_never_rises(seed, max_order, num_grid):
    entries = [replace(entry, max_order=max_order) for entry in masses(seed)]
    thetas = theta_grid(num_grid)
    curve = overhead_curve(entries, thetas)
    expected = [brute_force(entries, float(theta), max_order) for theta in thetas]
    assert curve.tolist() == pytest.approx(expected, rel=1e-12)
    assert (curve.diff() <= 0).all()


def test_masses_exactly_on_a_threshold_are_not_duplicated():
    theta = torch.tensor([0.1])
    for power, order in ((1, 0), (2, 1), (4, 2), (8, 3)):
        on = AttentionMass(0, 0, 1, (theta * power).view(1, 1, 1), 64, 4, 4)
        above = AttentionMass(0, 0, 1, torch.nextafter(on.abar_BHl, torch.ones(())), 64, 4, 4)
        for entry, expected in ((on, order), (above, min(order + 1, 3))):
            extra = overhead_curve([entry], theta) - entry.fixed_bops
            assert float(extra) == (2**expected - 1) * entry.bops_per_copy


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.001, 0.2))
def test_theta_is_the_smallest_within_the_budget(seed, alpha):
    entries, total, num_grid = masses(seed), 40_000_000, 130
    result = search_theta(entries, total, alpha, num_grid)
    grid = theta_grid(num_grid).tolist()
    affordable = [t for t in grid if brute_force(entries, t, 3) <= alpha * total]
    if not affordable:
        assert (result.status, result.theta) == ("over_budget", 1.0)
        assert result.overhead > result.budget
        return
    assert result.theta == affordable[0]
    assert result.status == ("budget_not_reached" if result.theta == grid[0] else "ok")
    assert result.overhead == pytest.approx(brute_force(entries, result.theta, 3))
    assert result.overhead <= result.budget and result.fraction <= alpha


def test_budget_outside_the_curve_is_a_status():
    assert search_theta(masses(0), 1).status == "over_budget"
    rich = search_theta(masses(0), HUGE, num_grid=100)
    assert (rich.status, rich.theta) == ("budget_not_reached", pytest.approx(0.01))
    assert search_theta(masses(0), HUGE, alpha=0).status == "over_budget"
    without = [replace(entry, max_order=0) for entry in masses(0)]
    for off in (search_theta([], HUGE), search_theta(without, HUGE)):
        assert (off.status, off.theta, off.overhead, off.copies) == ("off", 1.0, 0.0, ())


def test_copies_are_those_of_the_quantizer():
    entries = masses(5)
    result = search_theta(entries, 40_000_000, 0.02, 1000)
    for entry, stat in zip(entries, result.copies, strict=True):
        order = orders(entry.abar_BHl, result.theta, 3)
        rows, heads, keys = order.shape
        assert (stat.block, stat.scale, stat.keys) == (entry.block, entry.scale, keys)
        assert stat.duplicated == pytest.approx(float((order > 0).sum()) / (rows * heads))
        assert stat.mean_copies == pytest.approx(float((2.0**order).mean()))
    assert any(stat.duplicated > 0 for stat in result.copies)
    assert json.loads(json.dumps(result.to_dict()))["status"] == result.status


def test_copy_stat_at_the_ends():
    entry = AttentionMass(0, 1, 4, torch.ones(1, 2, 5), 64, 4, 4)
    assert copy_stat(entry, 1.0).mean_copies == 1.0
    assert copy_stat(entry, 1.0).duplicated == 0.0
    assert copy_stat(entry, 1e-3).mean_copies == 8.0
    assert copy_stat(entry, 1e-3).duplicated == 5.0


def test_every_row_repeated_costs_the_same():
    entries = masses(1)
    twice = [
        AttentionMass(e.block, e.scale, e.num_queries, e.abar_BHl.repeat(2, 1, 1), 64, 4, 6)
        for e in entries
    ]
    assert torch.equal(
        overhead_curve(entries, theta_grid(50)), overhead_curve(twice, theta_grid(50))
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_attention_is_named(bad):
    entries = masses(0)
    entries[4].abar_BHl[0, 0, 1] = bad
    with pytest.raises(NonFiniteError, match="block 1 at scale 1"):
        search_theta(entries, HUGE)


@pytest.mark.parametrize("change", [{"alpha": -1.0}, {"alpha": float("nan")}, {"num_grid": 0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        search_theta(masses(0), HUGE, **change)


def test_attention_is_measured_before_its_quantization(tiny: Pipeline) -> None:
    """With everything else in float, abar is the mean of the float model's softmax."""
    linears = (LayerRule(targets=t, weight=None, input=None) for t in ("*", "blocks.*.ffn.fc2"))
    spec = PAPER.attention
    assert spec is not None
    attention = spec.replace(query=None, key=None)
    model = convert(tiny.var, PAPER.replace(attention=attention).with_rules(*linears))
    samples = calibration_set(tiny, FEW, seed=0, resampled=False)
    measured = measure_attention(tiny, model, samples, 3)
    exact = trace(tiny.var, *both_rows(tiny, samples.prompts[:3], samples.tokens[:3]))
    for mass in [m for m in measured if m.block == 0]:  # block 1 reads quantized products
        part, end = tiny.scales.slices()[mass.scale], tiny.scales.ends[mass.scale]
        expected = exact.probabilities[0][:, :, part, :end].mean(2)
        torch.testing.assert_close(mass.abar_BHl.double(), expected, rtol=0, atol=1e-5)
        assert (mass.num_queries, mass.head_dim) == (tiny.scales.lengths[mass.scale], 64)
        assert (mass.probability_bits, mass.value_bits) == (4, 4)
    assert not any(mix._forward_pre_hooks for mix in quant_mixes(model))
