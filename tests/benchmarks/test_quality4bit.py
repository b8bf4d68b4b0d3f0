"""The script of the 4-bit study: its rows, its twin, and the FP4 formats of its baseline."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.common import fpqvar, orbitquant
from benchmarks.quality import quality4bit as study
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.quant.codebook import entries, reach
from varptq.quant.convert import convert


@pytest.fixture(scope="module")
def test_set(tiny: Pipeline) -> CalibrationSet:
    return calibration_set(tiny, CalibrationConfig(num_samples=4), seed=1, resampled=False)


@pytest.mark.slow
def test_every_row_converts_and_has_a_name_of_its_own(tiny: Pipeline) -> None:
    keys = [(run, e.label) for run, listed in study.rows().items() for e in listed]
    assert len(keys) == len(set(keys))
    for listed in study.rows().values():
        for entry in listed:
            convert(tiny.var, entry.config)
            assert study.bops(tiny.var, entry) > 0.9


def test_the_twin_is_uneven_and_the_same(tiny: Pipeline, test_set: CalibrationSet) -> None:
    twin = study.with_outliers(tiny)
    assert study.check_twin(tiny, twin, test_set) < 1e-7
    columns = [p.var.blocks[0].ffn.fc1.weight.detach().norm(dim=0) for p in (tiny, twin)]
    spreads = [float(x.max() / x.min()) for x in columns]
    assert spreads[1] > 5 * spreads[0]


def test_a_twin_of_another_function_is_refused(tiny: Pipeline, test_set: CalibrationSet) -> None:
    var = copy.deepcopy(tiny.var)
    var.head.bias.data[0] += 0.1
    with pytest.raises(InputError, match=r"twin of tiny: KL .*, expected below 1e-06"):
        study.check_twin(tiny, replace(tiny, var=var), test_set)


def test_the_judge_agrees_with_itself(tiny: Pipeline, test_set: CalibrationSet) -> None:
    found = study.Judge(tiny, test_set).kl(tiny)
    assert found["kl"] == 0 and found["top1"] == 1
    assert found["kl_per_scale"] == [0.0] * tiny.scales.num_scales


@pytest.mark.parametrize("name", ["E2M1", "E1M2"])
def test_fp4_takes_the_nearest_level(name: str) -> None:
    levels = getattr(fpqvar, name)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = fpqvar.fp4(x, levels)
    for row, fake in zip(x.view(-1, 128), found.view(-1, 128), strict=True):
        table = torch.tensor([*levels, *(-v for v in levels)]) * row.abs().max() / levels[-1]
        nearest = (row[:, None] - table).abs().amin(1)
        torch.testing.assert_close((row - fake).abs(), nearest, rtol=0, atol=1e-6)
    assert len(found.view(-1, 128)[0].unique()) <= 15


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_codebook_of_a_sphere_is_that_of_a_gaussian_in_many_dimensions(num_bits: int) -> None:
    width = 4096
    ours = entries(num_bits).float() * reach(num_bits)
    found = orbitquant.codebook(num_bits, width) * width**0.5
    torch.testing.assert_close(found, ours, rtol=0.02, atol=0.01)
    # In three dimensions a coordinate is uniform, and the best steps are even.
    even = orbitquant.codebook(num_bits, 3).diff()
    torch.testing.assert_close(even, torch.full_like(even, 2.0**-num_bits * 2), rtol=1e-3, atol=0)


def test_orbitquant_rounds_to_the_nearest_entry_in_its_basis(tiny: Pipeline) -> None:
    linear = tiny.var.blocks[0].ffn.fc1
    rotation = orbitquant.Rotation(linear.in_features, 3)
    unit = rotation(torch.eye(linear.in_features))
    torch.testing.assert_close(unit @ unit.T, torch.eye(linear.in_features), atol=1e-6, rtol=0)
    weight = linear.weight.detach()
    found = orbitquant.rounded(weight, 4, rotation)
    norm, book = weight.norm(dim=-1, keepdim=True), orbitquant.codebook(4, linear.in_features)
    distance = (rotation(weight)[..., None] - norm[..., None] * book).abs().amin(-1)
    torch.testing.assert_close((rotation(weight) - found).abs(), distance, atol=1e-6, rtol=1e-4)


def test_orbitquant_leaves_what_it_is_given(tiny: Pipeline, test_set: CalibrationSet) -> None:
    judge = study.Judge(tiny, test_set)
    loss = [judge.kl(orbitquant.orbitquant(tiny, (b, b), 0))["kl"] for b in (2, 4)]
    assert loss[0] > loss[1] > 0 and judge.kl(tiny)["kl"] == 0
