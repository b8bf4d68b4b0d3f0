"""GPTQ against nearest rounding, brute force and the moments by loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.calibrate import reconstruct as module
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.gptq import (
    TRIED,
    gptq_codes,
    inverse_factor,
    quadratic_loss,
    solved_rows,
)
from varptq.calibrate.reconstruct import Schedule, reconstruct_unit, unit_layers
from varptq.calibrate.record import Recorder, Unit
from varptq.calibrate.samples import calibration_set
from varptq.calibrate.solve import input_moments
from varptq.models.pipeline import Pipeline
from varptq.models.var.transformer import VAR
from varptq.quant.affine import Grid, affine_codes, affine_grid, affine_values
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.quantizers import QUANTIZERS

CONFIG = CalibrationConfig(num_samples=3, steps=12, rounding="gptq")


def problem(outputs: int, groups: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (O, G, g), and moments of correlated inputs, a few of them of much larger range."""
    generator = torch.Generator().manual_seed(seed)
    width = groups * size
    weight = torch.randn(outputs, groups, size, generator=generator)
    mixing = torch.randn(width, width, generator=generator)
    x = torch.randn(4 * width, width, generator=generator) @ mixing
    return weight, x.T @ x


def loss(weight: Tensor, codes: Tensor, grid: Grid, moments: Tensor) -> float:
    return quadratic_loss((weight - affine_values(codes, grid)).flatten(1), moments)


@settings(max_examples=25)
@given(st.sampled_from([(1, 1, 1), (3, 1, 37), (5, 2, 65), (4, 1, 130)]), st.integers(0, 50))
def test_a_diagonal_is_nearest_rounding(shape: tuple[int, int, int], seed: int) -> None:
    weight, moments = problem(*shape, seed)
    grid = affine_grid(weight, 4)
    found = gptq_codes(weight, grid, 4, moments.diagonal().diag())
    assert found.shape == weight.shape and torch.equal(found, affine_codes(weight, grid, 4))


@pytest.mark.parametrize("shape", [(3, 1, 7), (8, 2, 37), (4, 3, 130)])
@pytest.mark.parametrize("num_bits", [2, 4])
def test_its_own_loss_is_far_below_that_of_nearest(
    shape: tuple[int, int, int], num_bits: int
) -> None:
    ratios = []
    for seed in range(10):
        weight, moments = problem(*shape, seed)
        grid = affine_grid(weight, num_bits)
        found = gptq_codes(weight, grid, num_bits, moments)
        assert torch.equal(found, found.round().clamp(0, 2**num_bits - 1))
        nearest = loss(weight, affine_codes(weight, grid, num_bits), grid, moments)
        ratios.append(loss(weight, found, grid, moments) / nearest)
    assert sum(ratios) / len(ratios) < 0.75


CODEBOOK = QUANTIZERS["codebook"]


def row_losses(weight: Tensor, codes: Tensor, grid: Grid, bits: int, moments: Tensor) -> Tensor:
    """(O,) float64."""
    values = CODEBOOK.values(codes, grid, bits)
    error = (weight - values).flatten(1).double()
    return ((error @ moments.double()) * error).sum(-1)


@pytest.mark.parametrize("shape", [(3, 1, 1), (8, 1, 37), (4, 3, 130)])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_a_codebook_takes_the_better_size_and_fits_it(
    shape: tuple[int, int, int], num_bits: int
) -> None:
    """Row by row against both sizes alone, and against scales around the fitted one."""
    weight, moments = problem(*shape, seed=num_bits)
    weight[0] = 0.0
    nearest = CODEBOOK.grid(weight, num_bits)
    solved = solved_rows(weight, nearest, num_bits, moments, CODEBOOK)
    found = row_losses(weight, *solved, num_bits, moments)
    alone = []
    for factor in TRIED:
        grid = Grid(nearest.scale * factor, nearest.zero_point)
        codes = gptq_codes(weight, grid, num_bits, moments, quantizer=CODEBOOK)
        alone.append(row_losses(weight, codes, grid, num_bits, moments))
    assert bool((found <= torch.stack(alone).amin(0) * (1 + 1e-6)).all())
    for change in (0.999, 1.001):
        other = Grid(solved.grid.scale * change, solved.grid.zero_point)
        beside = row_losses(weight, solved.codes, other, num_bits, moments)
        assert bool((found <= beside * (1 + 1e-6)).all())
    assert float(solved.grid.scale[0].abs().max()) == 0.0
    if shape[-1] > 1:
        plain = row_losses(
            weight, CODEBOOK.codes(weight, nearest, num_bits), nearest, num_bits, moments
        )
        assert float(found.sum()) < 0.8 * float(plain.sum())


def test_even_steps_keep_their_scales() -> None:
    weight, moments = problem(5, 2, 65, seed=0)
    grid = affine_grid(weight, 4)
    solved = solved_rows(weight, grid, 4, moments, QUANTIZERS["affine"])
    assert solved.grid is grid and torch.equal(solved.codes, gptq_codes(weight, grid, 4, moments))


def test_it_is_near_the_best_there_is() -> None:
    """All codes of a row of four weights tried: GPTQ closes most of the gap nearest leaves."""
    gaps = []
    for seed in range(30):
        weight, moments = problem(1, 1, 4, seed)
        grid = affine_grid(weight, 2)
        choices = itertools.product(range(4), repeat=4)
        best = min(
            loss(weight, torch.tensor(codes).float().view(1, 1, 4), grid, moments)
            for codes in choices
        )
        near = loss(weight, affine_codes(weight, grid, 2), grid, moments)
        found = loss(weight, gptq_codes(weight, grid, 2, moments), grid, moments)
        assert found >= best * (1 - 1e-5)
        gaps.append((found - best, near - best))
    assert sum(gap for gap, _ in gaps) < 0.5 * sum(gap for _, gap in gaps)


@pytest.mark.parametrize("width", [1, 3, 37])
def test_the_factor_is_that_of_the_damped_inverse(width: int) -> None:
    _, moments = problem(1, 1, width, 0)
    factor = inverse_factor(moments, 0.1).double()
    damped = moments.double() + 0.1 * moments.double().diagonal().mean() * torch.eye(width)
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(width).double(), atol=1e-4, rtol=0
    )
    assert torch.equal(factor, factor.triu())


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = problem(3, 1, 9, 0)
    for zero in (moments * 0, moments.clone().index_fill_(0, torch.tensor([2]), 0)):
        zero[:, 2] = 0
        grid = affine_grid(weight, 4)
        codes = gptq_codes(weight, grid, 4, zero)
        assert codes.isfinite().all()
        assert torch.equal(codes[:, :, 2], affine_codes(weight, grid, 4)[:, :, 2])


def units(pipe: Pipeline, model: VAR) -> dict[str, Callable[[], Unit]]:
    samples = calibration_set(pipe, CONFIG, seed=0, resampled=False)
    recorder = Recorder(pipe, model.get_submodule, samples, CONFIG)
    return {name: lambda name=name: next(iter(recorder.units([name]))) for name in recorder.costs()}


@pytest.mark.parametrize("preset", ["w4a4+paper", "w4a4+paper+center+rotate"])
@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.1.ffn", "head", "blocks.0.ada_lin.1"])
def test_moments_are_those_of_what_meets_the_weight(tiny: Pipeline, preset: str, name: str) -> None:
    model = convert(tiny.var, QuantConfig.preset(preset))
    unit = units(tiny, model)[name]()
    layer = unit_layers(unit)[-1]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, arguments: seen.append(layer.quantized_input(*arguments))
    )
    with torch.no_grad():
        unit.run(unit.inputs)
    handle.remove()
    expected = torch.zeros(layer.in_features, layer.in_features).double()
    weights = unit.token_weights
    for row in seen[0].double():
        for position, x in enumerate(row if weights is not None else row.unsqueeze(0)):
            weight = 1.0 if weights is None else float(weights[position])
            expected += weight * torch.outer(x, x)
    with torch.no_grad():
        found = input_moments(unit, layer)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["gptq", "gptq+adaround"])
def test_units_improve(tiny: Pipeline, rounding: str) -> None:
    model = convert(tiny.var, QuantConfig.preset("w4a4+paper"))
    config = CONFIG.replace(rounding=rounding)
    kinds = set()
    for name, unit in units(tiny, model).items():
        report = reconstruct_unit(unit(), config, 0)
        assert report is not None and report.loss_gptq is not None, name
        kinds.add(report.kept)
        assert report.steps == (12 if rounding == "gptq+adaround" else 0)
        if report.kept == "gptq":
            assert report.loss_gptq < report.loss_nearest
    assert ("learned" if rounding == "gptq+adaround" else "gptq") in kinds


def test_learning_starts_at_the_codes_gptq_found(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "train", lambda *_: 0)
    model = convert(tiny.var, QuantConfig.preset("w4a4+paper"))
    report = reconstruct_unit(
        units(tiny, model)["blocks.0.ffn"](), CONFIG.replace(rounding="gptq+adaround"), 0
    )
    assert report is not None and report.loss_hard == report.loss_gptq != report.loss_nearest


def test_nearest_leaves_all_as_it_is(tiny: Pipeline) -> None:
    model = convert(tiny.var, QuantConfig.preset("w4a4+paper"))
    unit = units(tiny, model)["blocks.0.ffn"]()
    assert reconstruct_unit(unit, CONFIG.replace(rounding="nearest"), 0) is None


def phases(steps: int, patience: int | None, losses: Callable[[int], float]) -> list[float]:
    schedule, found = Schedule(steps, patience), []
    while schedule.phase < 1:
        found.append(schedule.phase)
        schedule.advance(losses(schedule.made))
    assert schedule.made == len(found)
    return found


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 99))
def test_a_schedule_rises_and_ends(steps: int, patience: int, seed: int) -> None:
    draw = torch.rand(steps, generator=torch.Generator().manual_seed(seed)).tolist()
    found = phases(steps, patience, lambda step: draw[step])
    assert found[0] == 0 and found == sorted(set(found)) and len(found) <= steps
    assert phases(steps, None, lambda step: 1.0) == [step / steps for step in range(steps)]


def test_a_plateau_ends_early_and_a_descent_does_not() -> None:
    assert len(phases(1000, 50, lambda step: 1.0)) == 3 * 50
    assert len(phases(1000, 50, lambda step: 0.99**step)) == 1000
