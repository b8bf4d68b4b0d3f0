"""Correction of targets: the closed form, what units read in the quantized model, whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import varptq
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.gptq import DAMPING, corrected
from varptq.calibrate.quantize import quantize
from varptq.calibrate.reconstruct import reconstruct_unit, unit_layers
from varptq.calibrate.record import Recorder
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.solve import cross_moments
from varptq.models.pipeline import Pipeline
from varptq.models.reading import listening
from varptq.models.seams import spans_of
from varptq.quant.config import LinearSpec, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears
from varptq.work import Work

CONFIG = CalibrationConfig(num_samples=3, rounding="gptq")
# Sums of a few hundred products in float32.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def samples(tiny: Pipeline) -> CalibrationSet:
    return calibration_set(tiny, CONFIG, seed=0, resampled=False)


@pytest.mark.parametrize(("outputs", "width", "rows"), [(1, 1, 5), (3, 9, 40), (4, 9, 4)])
def test_the_correction_is_ridge_regression(outputs: int, width: int, rows: int) -> None:
    """Of W x' on x with the weight itself as prior, also where x has dead channels."""
    g = torch.Generator().manual_seed(rows)
    weight, plain = torch.randn(outputs, width, generator=g), torch.randn(rows, width, generator=g)
    met = plain + 0.3 * torch.randn(rows, width, generator=g)
    met[:, width // 2 + 1 :] = 0.0
    found = corrected(weight, met.T @ met, plain.T @ met)
    assert torch.allclose(corrected(weight, met.T @ met, met.T @ met), weight, atol=1e-6)
    ridge = DAMPING * float((met.T @ met).diagonal().mean())
    # |W' x - W x'|^2 + ridge |W' - W|^2, as one least-squares problem.
    left = torch.cat([met, ridge**0.5 * torch.eye(width)]).double()
    right = torch.cat([plain @ weight.T, ridge**0.5 * weight.T]).double()
    wanted = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_units_read_what_the_quantized_model_gives_them(
    tiny: Pipeline, samples: CalibrationSet
) -> None:
    """Against one pass of the quantized model through all stages, once its units are final."""
    model = convert(tiny.var, QuantConfig.preset("w2a8"))
    recorder = Recorder(tiny, model.get_submodule, samples, CONFIG)
    behind: dict[str, Tensor] = {}
    for unit in recorder.units(follow=model):
        if unit.behind is not None:
            assert isinstance(unit.behind, Tensor)
            behind[unit.name] = unit.behind.clone()
        reconstruct_unit(unit, CONFIG, 0)
    assert len(behind) == sum(len(stage.token_units) for stage in recorder.stages)
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, *_: Any) -> None:
        seen[name] = x

    every = slice(0, recorder.num_rows)
    modules = {name: model.get_submodule(name) for name in behind}
    with torch.no_grad(), listening(modules, keep):
        inputs = tiny.vae.teacher_inputs(samples.tokens.repeat(2, 1))
        x = model.embed(model.condition(recorder.prompts[every]), inputs)
        for stage in recorder.stages_of(model, every):
            x = stage.run(x, spans_of(tiny.scales), None)
    for name, found in behind.items():
        torch.testing.assert_close(found, seen[name], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["blocks.1.ffn", "head"])
def test_cross_moments_are_sums_over_pairs(
    tiny: Pipeline, samples: CalibrationSet, name: str
) -> None:
    model = convert(tiny.var, QuantConfig.preset("w3a8"))
    for unit in Recorder(tiny, model.get_submodule, samples, CONFIG).units(follow=model):
        if unit.name != name:
            continue
        layer = unit_layers(unit)[0]
        assert unit.float_module is not None and unit.behind is not None
        assert unit.token_weights is not None
        weights = unit.token_weights.sqrt()  # of a codebook
        spans = spans_of(tiny.scales)
        # Both read the unit's input as it is.
        every = torch.arange(len(unit.inputs))
        plain = layer.plain_input(unit.inputs[every], spans).double()
        met = layer.quantized_input(unit.behind[every], spans).double()
        with torch.no_grad():
            own, cross = cross_moments(unit, layer)
        for found, read in ((own, met), (cross, plain)):
            expected = torch.einsum("l,rli,rlj->ij", weights.double(), read, met)
            largest = float(expected.max())
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * largest)
        return
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("preset", "asked", "corrects"),
    [
        ("w2a8", None, True),
        ("w3a8", None, True),
        ("w3a6+codebook", None, True),
        ("w3a5+codebook", None, False),
        ("w4a8+codebook", None, False),
        ("w3a8", False, False),
        ("w3a8+paper", None, False),
        ("w4a4", None, False),
        ("w4a4", True, True),
    ],
)
def test_where_targets_are_corrected(preset: str, asked: bool | None, corrects: bool) -> None:
    spec = QuantConfig.preset(preset).linear
    assert CONFIG.replace(correct_targets=asked).corrects(spec) == corrects
    assert not CONFIG.replace(correct_targets=asked, rounding="nearest").corrects(spec)
    assert not CONFIG.corrects(LinearSpec(weight=None, input=spec.input))


def codes(pipe: Pipeline, **changes: Any) -> dict[str, tuple[Tensor, Tensor]]:
    config, calibration = QuantConfig.preset("w2a8"), CONFIG.replace(**changes)
    made = varptq.quantize(pipe, config, calibration=calibration)
    return {n: (layer.codes, layer.scale) for n, layer in quant_linears(made.var).items()}


@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_same_codes(tiny: Pipeline, tmp_path: Path) -> None:
    """Pieces that are there are taken, so that later units still follow them."""
    whole, without = codes(tiny), codes(tiny, correct_targets=False)
    assert any(not torch.equal(whole[n][0], without[n][0]) for n in whole)
    config = QuantConfig.preset("w2a8")
    with Work(tmp_path / "work") as work:
        quantize(tiny, config, calibration=CONFIG, work=work)
        for piece in sorted((tmp_path / "work").glob("unit-*"))[::2]:
            piece.unlink()
        again = quantize(tiny, config, calibration=CONFIG, work=work)
    for name, layer in quant_linears(again.var).items():
        assert torch.equal(layer.codes, whole[name][0]), name
        assert torch.equal(layer.scale, whole[name][1]), name
