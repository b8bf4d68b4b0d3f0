"""The script of the 4-bit study: its rows, its twin, and the FP4 formats of its baseline."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.common import fpqvar
from benchmarks.quality import quality4bit as study
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.quant.convert import convert


@pytest.fixture(scope="module")
def test_set(tiny: Pipeline) -> CalibrationSet:
    return calibration_set(tiny, CalibrationConfig(num_samples=4), seed=1, resampled=False)


@pytest.mark.slow
def test_every_row_converts_and_has_a_name_of_its_own(tiny: Pipeline) -> None:
    keys = [(run, e.label) for run, entries in study.rows().items() for e in entries]
    assert len(keys) == len(set(keys))
    for entries in study.rows().values():
        for entry in entries:
            if entry.config is not None:
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
