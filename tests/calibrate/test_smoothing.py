"""Smoothing: against brute force, the function stays, and a model made uneven comes back even."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import input_moments
from varptq.calibrate.quantize import quantize
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import diagonal, smoothed
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.folds import scale

CONFIG = CalibrationConfig(num_samples=6, steps=0)
W4A4 = QuantConfig.preset("w4a4")


@pytest.fixture(scope="module")
def samples(tiny: Pipeline) -> CalibrationSet:
    return calibration_set(tiny, CONFIG, seed=0, resampled=False)


def kl(pipe: Pipeline, other: Pipeline, samples: CalibrationSet) -> float:
    return token_fidelity(pipe, other, samples.prompts, samples.tokens).kl


def uneven(pipe: Pipeline, sigma: float = 1.5) -> Pipeline:
    """The same function with channels of very different size."""
    var, generator = copy.deepcopy(pipe.var), torch.Generator().manual_seed(0)

    def factors() -> Tensor:
        return (sigma * torch.randn(var.arch.width, generator=generator)).exp()

    for place in var.folds().values():
        scale(place, factors())
    return replace(pipe, var=var)


def test_spread_is_the_deviation_from_the_mean_of_the_scale(
    tiny: Pipeline, samples: CalibrationSet
) -> None:
    name, seen = "blocks.1.ffn.fc1", []
    handle = tiny.var.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].double())
    )
    moments = input_moments(tiny, [name], samples)[name]
    handle.remove()
    x_NLC = torch.cat(seen)
    parts = [x_NLC[:, part].flatten(0, 1) for part in tiny.scales.slices()]
    centred = torch.cat([part - part.mean(0) for part in parts])
    torch.testing.assert_close(moments.spread(), centred.square().mean(0).sqrt(), rtol=1e-6, atol=0)


def test_diagonal_is_the_least_product_of_both_sides() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, a_C = (torch.randn(shape, generator=generator).double() for shape in ((7, 37), (37,)))
    weight, a_C = weight * torch.linspace(-3, 3, 37).exp(), a_C.exp()
    w2_C = weight.square().mean(0)

    def error(d_C: Tensor) -> float:
        return float((w2_C / d_C.square()).sum() * (a_C * d_C).square().sum())

    best = diagonal([weight], a_C)
    assert float(best.log().mean().abs()) < 1e-12
    for seed in range(20):
        noise = 0.1 * torch.randn(37, generator=torch.Generator().manual_seed(seed)).double()
        assert error(best * noise.exp()) > error(best)


def test_dead_channels_take_finite_factors() -> None:
    weight, spread = torch.ones(3, 5), torch.tensor([1.0, 0, 1, 1, 1])
    assert bool(diagonal([weight], spread).isfinite().all())
    assert torch.equal(diagonal([weight], torch.zeros(5)), torch.ones(5).double())


def test_smoothing_keeps_the_function_and_the_model_given(
    tiny: Pipeline, samples: CalibrationSet
) -> None:
    before = copy.deepcopy(tiny.var.state_dict())
    pipe, count = smoothed(tiny, W4A4, lambda: samples)
    assert count == 3 * tiny.var.arch.depth + 1
    assert all(torch.equal(v, before[name]) for name, v in tiny.var.state_dict().items())
    assert not torch.equal(pipe.var.head.weight, tiny.var.head.weight)
    assert kl(tiny, pipe, samples) < 1e-9


def test_configs_that_want_none_cost_no_samples(tiny: Pipeline) -> None:
    def never() -> CalibrationSet:
        raise AssertionError

    config = W4A4.with_rules(LayerRule(targets="*", input_transform=None))
    for unsmoothed in (config, QuantConfig.preset("w4a4+paper+center+rotate")):
        assert smoothed(tiny, unsmoothed, never) == (tiny, 0)


@pytest.mark.parametrize("kind", ["tiny", "tiny_shared"])
def test_an_uneven_model_quantizes_as_well_as_the_even_one(
    kind: str, samples: CalibrationSet, request: pytest.FixtureRequest
) -> None:
    """The diagonal that was put in is taken out again, up to its geometric mean; also where it is
    in gains, as the blocks share their AdaLN layer."""
    tiny: Pipeline = request.getfixturevalue(kind)
    twin = uneven(tiny)
    assert kl(tiny, twin, samples) < 1e-9
    config = QuantConfig.preset("w6a6")
    even, back = (
        kl(tiny, quantize(p, config, method="rtn", calibration=CONFIG), samples)
        for p in (tiny, twin)
    )
    rough_config = QuantConfig.preset("w6a6+paper+center+rotate+p8+io8+token")
    rough = kl(tiny, quantize(twin, rough_config, method="rtn", calibration=CONFIG), samples)
    assert back < 1.5 * even and rough > 3 * even
