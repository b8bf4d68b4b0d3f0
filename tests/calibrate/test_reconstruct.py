"""Reconstruction of units: the loss by loops, what is kept, determinism, both ways of training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.calibrate import reconstruct as module
from varptq.calibrate.config import PRESETS, CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.calibrate.reconstruct import (
    evaluate,
    reconstruct_unit,
    unit_generator,
    unit_layers,
    unit_loss,
)
from varptq.calibrate.record import Recorder, Unit, scale_weights
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import ConfigError, NonFiniteError
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.seams import spans_of
from varptq.models.var.transformer import VAR
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears, set_theta
from varptq.quant.layers import LearnedRounding
from varptq.work import Work

# Few rows and steps: what is tested holds after any number of them.
CONFIG = CalibrationConfig(num_samples=4, steps=15)
THETA = 0.1
Codes = dict[str, Tensor]


@pytest.fixture(scope="module")
def samples(tiny: Pipeline) -> CalibrationSet:
    return calibration_set(tiny, CONFIG, seed=0, resampled=False)


def quantized(pipe: Pipeline, preset: str = "w4a4+paper") -> VAR:
    model = convert(pipe.var, QuantConfig.preset(preset))
    set_theta(model, THETA)
    return model


def codes_of(model: VAR) -> Codes:
    return {
        name: layer.codes.clone()
        for name, layer in quant_linears(model).items()
        if layer.weight_bits
    }


def run_all(
    pipe: Pipeline,
    samples: CalibrationSet,
    config: CalibrationConfig,
    preset: str = "w4a4+paper",
    seed: int = 0,
) -> tuple[dict[str, module.UnitReport | None], Codes, Codes]:
    """Reports by unit, and the codes before and after."""
    model = quantized(pipe, preset)
    before, reports = codes_of(model), {}
    for unit in Recorder(pipe, model.get_submodule, samples, config).units():
        reports[unit.name] = reconstruct_unit(unit, config, seed)
    return reports, before, codes_of(model)


def toy_unit(pipe: Pipeline, model: VAR, rows: int = 12) -> Unit:
    """The FFN of block 0 on random inputs, with the float one as target."""
    layer, teacher = (m.get_submodule("blocks.0.ffn") for m in (model, pipe.var))
    inputs = torch.randn(rows, 14, 128, generator=torch.Generator().manual_seed(0))
    spans = spans_of(pipe.scales)

    def caller(piece: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: piece(x, spans)

    weights = scale_weights(spans)
    return Unit("toy", layer, caller(layer), caller(teacher), inputs, None, weights)


@given(
    sides=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rows=st.integers(1, 3),
    channels=st.integers(1, 5),
    first=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_the_loss_is_a_sum_of_means_over_scales(
    sides: list[int], rows: int, channels: int, first: int, seed: int
) -> None:
    """Sum over scales of the mean over rows and tokens of the channel-summed squared error."""
    scales = Scales(sides)
    lengths = scales.lengths[min(first, len(sides) - 1) :]
    weights = scale_weights(spans_of(scales, first=min(first, len(sides) - 1)))
    generator = torch.Generator().manual_seed(seed)
    output, target = (torch.randn(rows, sum(lengths), channels, generator=generator) for _ in "ab")
    expected, start = 0.0, 0
    for length in lengths:
        squares = [
            sum((output[r, t, c] - target[r, t, c]).item() ** 2 for c in range(channels))
            for r in range(rows)
            for t in range(start, start + length)
        ]
        expected += sum(squares) / len(squares)
        start += length
    assert float(unit_loss(output, target, weights)) == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_vectors_is_their_mean() -> None:
    output, target = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.zeros(2, 2)
    assert float(unit_loss(output, target, None)) == pytest.approx((5 + 16) / 2)


@settings(max_examples=10)
@given(st.integers(1, 12))
def test_evaluation_does_not_depend_on_how_rows_are_cut(tiny: Pipeline, rows: int) -> None:
    unit = toy_unit(tiny, quantized(tiny))
    chosen = torch.arange(rows)
    single = sum(evaluate(unit, chosen[i : i + 1]) for i in range(rows)) / rows
    assert evaluate(unit, chosen) == pytest.approx(single, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["hard", "soft"])
@pytest.mark.parametrize("preset", ["w4a4+paper", "w6a6+paper", "w3a8+paper+released"])
def test_every_unit_improves_or_keeps_nearest(
    tiny: Pipeline, samples: CalibrationSet, forward: str, preset: str
) -> None:
    reports, before, after = run_all(tiny, samples, CONFIG.replace(forward=forward), preset)
    kept = set()
    for name, report in reports.items():
        assert report is not None and report.name == name and report.steps == CONFIG.steps
        losses = (report.loss_nearest, report.loss_soft, report.loss_hard)
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)
        assert report.kept in ("learned", "nearest")
        kept.add(report.kept)
        own = [n for n in before if n == name or n.startswith(f"{name}.")]
        assert own
        same = all(torch.equal(before[n], after[n]) for n in own)
        if report.kept == "nearest":
            assert same and report.loss_hard >= report.loss_nearest
        else:
            assert not same and report.loss_hard < report.loss_nearest
    assert "learned" in kept
    for name, codes in before.items():
        assert int((codes.int() - after[name].int()).abs().max()) <= 1, name


def test_codes_of_a_worse_outcome_are_thrown_away(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training that turns every rounding the wrong way is no harm."""

    def spoil(_: Unit, roundings: list[LearnedRounding], *__: object) -> None:
        for rounding in roundings:
            rounding.alpha.data.neg_()

    monkeypatch.setattr(module, "train", spoil)
    model = quantized(tiny)
    unit, before = toy_unit(tiny, model), codes_of(model)
    with torch.no_grad():
        output = unit.run(unit.inputs)
    report = reconstruct_unit(unit, CONFIG, 0)
    assert report is not None and report.kept == "nearest"
    assert report.loss_hard > 2 * report.loss_nearest
    assert all(torch.equal(codes, before[name]) for name, codes in codes_of(model).items())
    with torch.no_grad():  # the weight in use is that of the codes again
        assert torch.equal(unit.run(unit.inputs), output)


def test_no_steps_keep_nearest(tiny: Pipeline, samples: CalibrationSet) -> None:
    reports, before, after = run_all(tiny, samples, CONFIG.replace(steps=0))
    assert set(reports.values()) == {None}
    assert all(torch.equal(codes, after[name]) for name, codes in before.items())


@pytest.mark.slow
def test_same_seed_same_codes(tiny: Pipeline, samples: CalibrationSet) -> None:
    runs = [run_all(tiny, samples, CONFIG, seed=seed) for seed in (0, 0, 1)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(codes, runs[1][2][name]) for name, codes in runs[0][2].items())
    assert any(not torch.equal(codes, runs[2][2][name]) for name, codes in runs[0][2].items())


@pytest.mark.slow
def test_units_do_not_depend_on_each_other(tiny: Pipeline, samples: CalibrationSet) -> None:
    """A unit alone gets the codes it gets among all others."""
    _, _, after = run_all(tiny, samples, CONFIG)
    model = quantized(tiny)
    for unit in Recorder(tiny, model.get_submodule, samples, CONFIG).units():
        if unit.name == "blocks.1.attn":
            reconstruct_unit(unit, CONFIG, 0)
    for name in ("blocks.1.attn.mat_qkv", "blocks.1.attn.proj"):
        assert torch.equal(codes_of(model)[name], after[name])


def test_row_draws_are_a_function_of_seed_and_unit() -> None:
    def draw(seed: int, name: str) -> list[int]:
        return torch.randint(1000, (5,), generator=unit_generator(seed, name)).tolist()

    assert draw(0, "head") == draw(0, "head")
    assert len({tuple(draw(s, n)) for s in (0, 1, -1) for n in ("head", "blocks.0.attn")}) == 6


@pytest.mark.slow
def test_units_in_float_are_skipped(tiny: Pipeline, samples: CalibrationSet) -> None:
    reports, before, after = run_all(tiny, samples, CONFIG, "w4a4+paper+litevar+skip-head")
    assert reports["head"] is None
    assert reports["blocks.0.ffn"] is not None  # fc1 is still learned
    assert "blocks.0.ffn.fc2" not in before and "blocks.0.ffn.fc1" in after


def test_a_layer_with_float_weight_is_no_layer_of_a_unit(tiny: Pipeline) -> None:
    unit = toy_unit(tiny, quantized(tiny, "w4a4+paper+litevar"))
    assert [layer.layer for layer in unit_layers(unit)] == ["blocks.0.ffn.fc1"]


@pytest.mark.slow
def test_the_released_settings_run(tiny: Pipeline, samples: CalibrationSet) -> None:
    config = CalibrationConfig.preset("released")
    assert (config.steps, config.learning_rate, config.regularizer) == (5000, 1e-4, 1e-5)
    assert (config.forward, config.beta_start, config.beta_end) == ("soft", 20, 2)
    reports, before, after = run_all(tiny, samples, config.replace(steps=10))
    # So small a rate moves alpha by about 1e-3 in 10 steps: what is soft stays near the start.
    for report in reports.values():
        assert report is not None and report.loss_soft < report.loss_nearest
    flips = sum(int((codes != after[name]).sum()) for name, codes in before.items())
    assert flips < 0.01 * sum(codes.numel() for codes in before.values())


@pytest.mark.slow
def test_the_regularizer_drives_soft_to_hard(tiny: Pipeline) -> None:
    """With a strong lambda the soft loss comes to what is deployed."""
    gaps = []
    for strength in (0.0, 1.0):
        unit = toy_unit(tiny, quantized(tiny, "w3a8+paper"))
        config = CONFIG.replace(forward="soft", regularizer=strength, steps=60)
        report = reconstruct_unit(unit, config, 0)
        assert report is not None
        gaps.append(abs(report.loss_hard - report.loss_soft) / report.loss_hard)
    assert gaps[1] < 0.02 < gaps[0]


@pytest.mark.slow
def test_no_learned_state_is_left(tiny: Pipeline, samples: CalibrationSet) -> None:
    model = quantized(tiny)
    for unit in Recorder(tiny, model.get_submodule, samples, CONFIG).units():
        reconstruct_unit(unit, CONFIG, 0)
    assert all(layer.rounding is None for layer in quant_linears(model).values())
    assert not any("alpha" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("rounding", ["adaround", "gptq"])
def test_a_loss_that_is_not_finite_names_the_unit(tiny: Pipeline, rounding: str) -> None:
    unit = toy_unit(tiny, quantized(tiny))
    unit = dataclasses.replace(unit, targets=torch.full_like(unit.inputs, torch.inf))
    with pytest.raises(NonFiniteError, match="unit toy: reconstruction loss is inf"):
        reconstruct_unit(unit, CONFIG.replace(rounding=rounding), 0)


def test_a_loss_beyond_its_dtype_ends_the_run_in_one_line(
    make_tiny: Callable[..., Pipeline], tmp_path: Path
) -> None:
    pipe = make_tiny()
    pipe.var.head.weight.mul_(1e20)
    config = CONFIG.replace(rounding="gptq", num_samples=1)
    with Work(tmp_path / "work") as work, pytest.raises(NonFiniteError, match="unit head: recon"):
        quantize(pipe, QuantConfig.preset("w4a4"), method="gptq", calibration=config, work=work)


def test_steps_are_reported_from_zero(tiny: Pipeline) -> None:
    seen: list[int] = []
    reconstruct_unit(
        toy_unit(tiny, quantized(tiny)), CONFIG, 0, lambda step, loss: seen.append(step)
    )
    assert seen == list(range(CONFIG.steps + 1))


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_valid(name: str) -> None:
    config = CalibrationConfig.preset(name)
    assert CalibrationConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CalibrationConfig.preset("quick"), "preset 'quick': unknown, known: default, rel"),
        (lambda: CalibrationConfig(num_samples=0), "num_samples is 0"),
        (lambda: CalibrationConfig(steps=-1), "steps is -1"),
        (lambda: CalibrationConfig(forward="firm"), "forward is 'firm'"),
        (lambda: CalibrationConfig(budget=-0.1), "budget is -0.1"),
        (lambda: CalibrationConfig(speed=1), "unknown field 'speed'"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_longer_runs_take_smaller_steps() -> None:
    """0.3 up to 200 steps, then by the square root; a rate that is given is taken as it is."""
    rates = [CalibrationConfig(steps=steps).rate for steps in (0, 20, 200, 800, 5000)]
    assert rates == pytest.approx([0.3, 0.3, 0.3, 0.15, 0.06])
    assert CalibrationConfig(steps=5000, learning_rate=0.2).rate == 0.2
    assert CalibrationConfig.preset("released").rate == 1e-4
