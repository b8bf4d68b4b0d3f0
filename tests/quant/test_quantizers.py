"""One set of properties for every row of the table of quantizers, and a toy row that goes all the
way from a config to an artifact.

A row is asked what it claims: its codes are its levels, its values the nearest ones where it says
so, `fake` the values of codes, the written gradient autograd's. What only one quantizer does is
tested under its own name (test_affine.py, test_sign_split.py, test_log2.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import varptq
from helpers.quantizer_cases import NAMES, Case, cases, probabilities
from varptq.calibrate.config import CalibrationConfig
from varptq.errors import ConfigError, InputError
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import float_layout
from varptq.quant.affine import Grid, wide
from varptq.quant.config import QuantConfig, TensorSpec
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears
from varptq.quant.quantizers import QUANTIZERS, Quantizer

# Of the distance between a value and its code's, in float64: quotient, product, nothing else.
ROUNDING = 1e-9


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_codes_are_levels_and_values_the_nearest(name: str, data: st.DataObject) -> None:
    """Against all values that the row's grid has, one by one."""
    row, spec, x = data.draw(cases(name))
    before = x.clone()
    grid = row.grid_of(x, spec)
    codes = row.codes(x, grid, spec.num_bits)
    levels = row.levels(spec.num_bits)
    assert torch.equal(codes, codes.round()) and codes.shape == x.shape
    assert levels[0] <= float(codes.min()) and float(codes.max()) <= levels[-1]
    values = row.values(codes, grid, spec.num_bits)
    assert torch.equal(values, row.fake(x, spec)) and torch.equal(x, before)
    assert torch.equal(row.values(codes.to(torch.int16), grid, spec.num_bits), values)
    every = torch.stack([row.values(torch.full_like(x, c), grid, spec.num_bits) for c in levels])
    step = float(every.diff(dim=0).abs().max()) if len(levels) > 1 else 0.0
    if row.nearest:
        excess = (values - x).abs() - (every - x).abs().amin(0)
        assert float(excess.max()) <= ROUNDING * max(step, float(x.abs().max()))
    assert row.signed == (levels[0] < 0)
    assert not (row.symmetric and row.signed) or levels[0] == -levels[-1]


def simple(name: str, num_bits: int = 4) -> Case:
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))
    row, spec = QUANTIZERS[name], TensorSpec(num_bits=num_bits, type=name)
    return row, spec, x.mul(3).softmax(-1) if probabilities(name) else x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """Values and gradients of a half are those of the same numbers in float32, rounded once."""
    row, spec, x = simple(name)
    gradients = []
    for leaf in (x.to(dtype).requires_grad_(), x.to(dtype).float().requires_grad_()):
        out = row.straight_through(leaf, spec)
        assert out.dtype == leaf.dtype
        assert torch.equal(out.to(dtype), row.fake(leaf.detach().float(), spec).to(dtype))
        out.float().sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        gradients.append(leaf.grad.float())
    # 8 bits of mantissa on either side: of the output, which the range's gradient is taken from,
    # and of the gradient itself. That of the range is a sum of 130 such.
    assert float((gradients[0] - gradients[1]).abs().max()) < 0.5
    assert float((gradients[0] - gradients[1]).abs().median()) < 2**-7


@pytest.mark.parametrize("power", [-60, -17, 1, 40])
@pytest.mark.parametrize("name", [n for n in NAMES if QUANTIZERS[n].unitless])
def test_a_unitless_row_gives_the_same_codes_in_other_units(name: str, power: int) -> None:
    row, spec, x = simple(name)
    x[1], x[2, 1:] = x[1].abs(), 0.0
    codes = [row.codes(y, row.grid_of(y, spec), spec.num_bits) for y in (x, x * 2.0**power)]
    assert torch.equal(*codes)
    assert torch.equal(row.fake(x * 2.0**power, spec), row.fake(x, spec) * 2.0**power)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_the_ends_of_the_float_range_are_no_nan(name: str, num_bits: int) -> None:
    row, spec, _ = simple(name, min(num_bits, QUANTIZERS[name].widths[-1]))
    rows = [[0.0] * 3, [1e-40, 1e-41, 0.0], [0.0, 1e-9, 1.0]]
    if not probabilities(name):
        rows += [[1e38, -1e38, 1.0], [5.0] * 3, [-0.17] * 3]
    x = torch.tensor(rows).requires_grad_()
    out = row.straight_through(x, spec)
    assert bool(out.isfinite().all()) and float(out.detach()[0].abs().max()) <= 1e-6
    out.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def config_with(name: str, num_bits: int = 4) -> QuantConfig:
    """w4a4 with this type wherever it may stand in a Linear; the rest as it is."""
    plain, operands = QuantConfig.preset("w4a4"), QUANTIZERS[name].operands
    weight, x = plain.linear.weight, plain.linear.input
    assert weight is not None and x is not None
    linear = plain.linear
    if "weight" in operands:
        linear = linear.replace(weight=weight.replace(type=name, num_bits=num_bits))
    if "input" in operands:
        linear = linear.replace(input=x.replace(type=name, num_bits=num_bits))
    return QuantConfig(name=name, linear=linear, attention=plain.attention)


@pytest.mark.parametrize("name", [n for n in NAMES if not probabilities(n)])
def test_shapes_are_known_without_memory(name: str, tiny: Pipeline) -> None:
    config = config_with(name)
    shapes = [
        {key: (t.shape, t.dtype) for key, t in convert(var, config).state_dict().items()}
        for var in (tiny.var, float_layout(tiny.var))
    ]
    assert shapes[0] == shapes[1]


# A toy: values of a table of int8 entries times one scale, fitted by least squares.


def entries(num_bits: int) -> Tensor:
    """(2^b,) int8 entries, closer together around zero."""
    position = torch.linspace(-1, 1, 2**num_bits, dtype=torch.float64)
    return (127 * position * position.abs().sqrt()).round()


def toy_codes(x: Tensor, grid: Grid, num_bits: int) -> Tensor:
    table = entries(num_bits).to(grid.scale.dtype)
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize((wide(x) / grid.scale).contiguous(), middles).to(grid.scale.dtype)


def toy_values(codes: Tensor, grid: Grid, num_bits: int) -> Tensor:
    return entries(num_bits).to(grid.scale.dtype)[codes.long()] * grid.scale


def toy_grid(x: Tensor, num_bits: int, dims: Any = -1) -> Grid:
    scale = (wide(x).abs().amax(dims, keepdim=True) / 127).clamp(min=2.0**-64)
    grid = Grid(scale, torch.zeros_like(scale))
    found = toy_values(toy_codes(x, grid, num_bits), Grid(torch.ones_like(scale), scale), num_bits)
    fitted = (found * x).sum(dims, keepdim=True) / found.square().sum(dims, keepdim=True)
    return Grid(torch.where(fitted > 2.0**-64, fitted, scale), grid.zero_point)


TOY = Quantizer(
    grid=toy_grid,
    codes=toy_codes,
    values=toy_values,
    operands={"weight": ("channel", "group"), "input": ("token", "group"), "query": ("token",)},
    widths=range(2, 7),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Quantizer:
    monkeypatch.setitem(QUANTIZERS, "toy", TOY)
    return TOY


def quantized(pipe: Pipeline, method: str = "gptq", **changes: Any) -> Any:
    calibration = CalibrationConfig(num_samples=2, theta_samples=2, steps=2, **changes)
    return varptq.quantize(pipe, config_with("toy"), method=method, calibration=calibration)


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_new_row_goes_from_config_to_artifact(tiny: Pipeline, tmp_path: Path) -> None:
    """One entry of the table, and nothing else knows of it: GPTQ asks it for the nearest codes,
    tuning moves its scales, the artifact keeps its codes, and integers refuse it by name."""
    config = config_with("toy")
    assert QuantConfig.from_dict(config.to_dict()) == config
    pipe = quantized(tiny, tune_steps=1)
    layer = quant_linears(pipe.var)["blocks.0.ffn.fc1"]
    nearest = quant_linears(convert(tiny.var, config))[layer.layer]
    assert layer.weight_bits == 4 and not torch.equal(layer.codes, nearest.codes)
    # Codes of another row would make it worse, and nearest ones be kept.
    assert all(unit["loss_gptq"] < unit["loss_nearest"] for unit in pipe.report["units"])
    assert torch.equal(
        layer.dequantized(), toy_values(layer.codes_grouped, layer.grid, 4).flatten(1)
    )
    again = varptq.load(varptq.save(pipe, tmp_path / "toy"), runtime="simulated")
    images = [varptq.generate(p, [1, 2], seed=0, decode=False).tokens for p in (pipe, again)]
    assert torch.equal(*images)
    for runtime in ("reference", "cpu"):
        with pytest.raises(InputError, match="weight type 'toy', expected 'affine'"):
            varptq.load(tmp_path / "toy", runtime=runtime)
    with pytest.warns(UserWarning, match="weight type 'toy'"):
        assert varptq.load(tmp_path / "toy").runtime == "simulated"


@pytest.mark.usefixtures("toy")
def test_what_a_new_row_does_not_do_is_refused_by_name(tiny: Pipeline) -> None:
    with pytest.raises(ConfigError, match="weight type 'toy' has no learned rounding"):
        quantized(tiny, "brecq", rounding="adaround")
    with pytest.raises(ConfigError, match="num_bits 8 with type 'toy', expected 2 to 6"):
        TensorSpec(num_bits=8, type="toy")
    for changes, words in (
        ({"operands": {"weights": ()}}, "operand 'weights', expected one of weight, input"),
        ({"levels": lambda b: range(-1, 2)}, "do not fit 2 bits"),
        ({"operands": {"value": ("token",)}}, "needs even_steps"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(TOY, **changes)
