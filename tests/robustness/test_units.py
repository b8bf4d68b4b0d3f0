"""Units of a model: quantizing 2^k x gives 2^k times what quantizing x gives, on every affine grid
that integers execute, and a model whose values are 2^k of another's gives the same logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

import varptq
from varptq.calibrate.config import CalibrationConfig
from varptq.models.pipeline import Pipeline
from varptq.models.seams import Span, ValueFold
from varptq.native import binding
from varptq.native.quantize import quantize
from varptq.quant import straight_through
from varptq.quant.adaround import init_alpha
from varptq.quant.affine import LEAST_SCALE, affine_codes, affine_fake, affine_grid
from varptq.quant.attention import QuantMix
from varptq.quant.config import AttentionSpec, QuantConfig, TensorSpec
from varptq.quant.folds import scale_values
from varptq.quant.shift_sum import fixed_codes
from varptq.runtime.convert import on_integers
from varptq.runtime.cpu import NativeKernels
from varptq.runtime.kernels import Kernels
from varptq.runtime.reference import ReferenceKernels

native = pytest.mark.skipif(binding.core() is None, reason=f"no native core: {binding.reason()}")
KERNELS = [
    pytest.param(ReferenceKernels, id="reference"),
    pytest.param(NativeKernels, id="native", marks=[native, pytest.mark.native]),
]
# Within float32 on both sides for rows of ordinary size, steps and products with them included.
POWERS = (-60, -40, -17, -1, 1, 17, 40, 60)


def rows() -> Tensor:
    """Ordinary rows, and those where ranges end: one sign, a constant, one value, zeros."""
    x = torch.randn(8, 37, generator=torch.Generator().manual_seed(0))
    x[1], x[2], x[3], x[4] = x[1].abs(), -x[2].abs(), 0.37, 0.0
    x[5, 1:] = 0.0
    x[6] *= 1e-9
    return x


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_an_affine_grid_has_no_units(
    num_bits: int, power: int, counted: Callable[[], None]
) -> None:
    counted()
    x, unit = rows(), 2.0**power
    plain, scaled = affine_grid(x, num_bits), affine_grid(unit * x, num_bits)
    assert torch.equal(plain.zero_point, scaled.zero_point)
    assert torch.equal(affine_codes(x, plain, num_bits), affine_codes(unit * x, scaled, num_bits))
    assert torch.equal(unit * affine_fake(x, num_bits), affine_fake(unit * x, num_bits))
    alike = init_alpha(x, plain), init_alpha(unit * x, scaled)
    assert torch.equal(*alike)
    orders = torch.tensor([0, 1, 2, 3]).repeat(2)
    codes = (fixed_codes(y, g, orders, num_bits) for y, g in ((x, plain), (unit * x, scaled)))
    assert torch.equal(*codes)


@pytest.mark.parametrize("power", POWERS)
def test_gradients_have_no_units(power: int, counted: Callable[[], None]) -> None:
    """Of the plain quantizer and of the one whose gradient is written out."""
    counted()
    found = []
    for fake in (affine_fake, straight_through.affine_fake):
        for unit in (1.0, 2.0**power):
            x = (unit * rows()).requires_grad_()
            (fake(x, 4) * torch.arange(37)).sum().backward()
            assert x.grad is not None
            found.append(x.grad)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("policy", ["token", "segment"])
@pytest.mark.parametrize("theta", [None, 0.05])
def test_values_have_no_units(
    policy: str, theta: float | None, counted: Callable[[], None]
) -> None:
    """Of the tokens of a head one is all zero; its step must not count beside small ones."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(2, 3, 5, 14, generator=generator).mul(3).softmax(-1)
    v = torch.randn(2, 3, 14, 16, generator=generator)
    v[:, :, 3] = 0.0
    value = TensorSpec(num_bits=4, strategy="token" if policy == "token" else "head")
    spec = AttentionSpec(
        query=None, key=None, probability=TensorSpec(num_bits=8, type="uniform"), value=value,
        policy=policy,
    )  # fmt: skip
    mix = QuantMix(spec, "here")
    mix.theta = theta
    span = Span(slice(0, 5), (1, 5, 14))
    expected = mix(p, v, span)
    for power in (-40, -17, 17, 60):
        counted()
        assert torch.equal(mix(p, v * 2.0**power, span), expected * 2.0**power)


@pytest.mark.parametrize("renormalize", [False, True])
def test_values_of_all_sizes_at_once(renormalize: bool, counted: Callable[[], None]) -> None:
    counted()
    v = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(2))
    v = v * torch.tensor([1e30, 1.0, 1e-30, 1e-42, 0.0, 1e-9]).view(6, 1)
    spec = AttentionSpec(
        query=None, key=None, probability=TensorSpec(num_bits=8, type="uniform"),
        value=TensorSpec(num_bits=8, strategy="token"), policy="token", renormalize=renormalize,
    )  # fmt: skip
    p = torch.full((1, 1, 2, 6), 1 / 6)
    out = QuantMix(spec, "here")(p, v, Span(slice(0, 2), (6,)))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("fill", [0.0, 1e-45, 1e-40, 1e-37, 1e-30, 1e-6, 1.0, 1e30, 1e38])
def test_a_scale_is_a_normal_float(fill: float, counted: Callable[[], None]) -> None:
    """Of a half, too, whose own numbers end at 6e-8: grids are float32."""
    counted()
    for x in (torch.full((1, 7), fill), torch.tensor([[fill, -fill, 0.0]])):
        for num_bits in (2, 8):
            grid = affine_grid(x, num_bits)
            assert bool(((grid.scale >= LEAST_SCALE) & grid.scale.isfinite()).all())
            # Where no normal float is a step of the range, nothing is represented.
            bound = 0.51 * grid.scale if fill > 255 * LEAST_SCALE else torch.tensor(fill)
            assert bool(((affine_fake(x, num_bits) - x).abs() <= bound).all())
    half = affine_grid(torch.full((1, 7), fill).half(), 8)
    assert half.scale.dtype == torch.float32 and bool((half.scale > 0).all())


@native
@pytest.mark.parametrize("power", POWERS)
def test_the_native_core_has_no_units(power: int, counted: Callable[[], None]) -> None:
    counted()
    x = rows()[:, :32].contiguous() * 2.0**power
    found, grid = quantize(x, num_bits=8), affine_grid(x, 8)
    assert torch.equal(found.scale.view(-1), grid.scale.view(-1))
    assert torch.equal(found.zero_point.view(-1).float(), grid.zero_point.view(-1))


def twin_of(pipe: Pipeline, power: int) -> Pipeline:
    """The same function with values 2^power of what they were."""
    twin = dataclasses.replace(pipe, var=deepcopy(pipe.var))
    for fold in twin.var.folds().values():
        if isinstance(fold, ValueFold):
            scale_values(fold, torch.full_like(fold.bias, 2.0**power))
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("policy", ["token", "segment"])
def test_a_model_has_no_units(
    policy: str, make: Callable[[], Kernels], tiny: Pipeline, counted: Callable[[], None]
) -> None:
    """All bits of the logits. Without smoothing, which chooses the units itself."""
    config = QuantConfig.preset(f"w8a8+paper+center+rotate+p8+io8+{policy}")
    calibration = CalibrationConfig(num_samples=2, theta_samples=2, steps=0)
    labels = torch.tensor([1, 2])
    ids = varptq.generate(tiny, [1, 2], seed=0, decode=False).tokens
    found = []
    for power in (0, -17, 40):
        counted()
        pipe = varptq.quantize(twin_of(tiny, power), config, method="rtn", calibration=calibration)
        for one in (pipe, on_integers(pipe, make())):
            found.append(one.var(labels, one.vae.teacher_inputs(ids)))
    for i, logits in enumerate(found[2:]):
        assert torch.equal(logits, found[i % 2])
