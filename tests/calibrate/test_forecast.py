"""What a run will take: the parts of every method, how they are multiplied, and no trace left."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.forecast import forecast
from varptq.calibrate.methods import MEANS_SAMPLES, Method
from varptq.calibrate.probe import CENTER, CONVERT, DRAW, RECORD, SOLVE, Cost, Costs, Probe
from varptq.calibrate.run import Run
from varptq.models.pipeline import Pipeline
from varptq.quant.config import LayerRule, QuantConfig

FEW = CalibrationConfig(num_samples=2, steps=2, theta_samples=1, theta_grid=50)
ALWAYS = {"converting", "drawing"}
UNITS = {"recording", "comparing"}
PARTS = {
    "rtn": ALWAYS | {"smoothing", "means"},
    "gptq": ALWAYS | UNITS | {"smoothing", "means", "solving"},
    "brecq": ALWAYS | UNITS | {"smoothing", "means", "learning"},
    "sas": ALWAYS | UNITS | {"smoothing", "means", "learning", "theta"},
}


@pytest.mark.parametrize("method", PARTS)
def test_every_method_has_its_parts(tiny: Pipeline, method: str) -> None:
    found = forecast(tiny, QuantConfig.preset("w4a4"), method=method, calibration=FEW)
    assert set(found.parts) <= PARTS[method]
    # Differences that come out below zero are left out.
    assert set(found.parts) >= PARTS[method] - {"smoothing", "solving"}
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert (found.images, found.steps) == (2, 2 if "learning" in found.parts else 0)
    assert json.loads(json.dumps(found.to_dict()))["seconds"] == found.seconds


def test_tuning_and_what_reads_no_images(tiny: Pipeline) -> None:
    paper = QuantConfig.preset("w4a4+paper")
    tuned = forecast(tiny, paper, method="rtn", calibration=FEW.replace(tune_steps=2))
    assert {"tuning", "measuring what tuning gains"} <= set(tuned.parts)
    nearest = forecast(tiny, paper, method="rtn", calibration=FEW)
    assert (set(nearest.parts), nearest.images) == ({"converting"}, 0)
    assert "no images" in nearest.work


def test_parts_are_multiplied(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block takes a, two take b, so five take a + 4 (b - a)."""

    def costs(self: Probe, blocks: int) -> Costs:
        self.in_block = {SOLVE: Cost(fixed=10.0, each=1.0)}
        found = {CONVERT: Cost(fixed=1.0 + blocks), DRAW: Cost(each=2.0 * blocks)}
        found |= {CENTER: Cost(each=1.0), RECORD: Cost(each=0.5)}
        return found | ({SOLVE: Cost(fixed=3.0)} if blocks == 1 else {})

    monkeypatch.setattr(Probe, "costs", costs)
    monkeypatch.setattr(Probe, "first_pass", lambda self: 1.0)
    pipe = make_tiny(depth=5)
    settings = FEW.replace(num_samples=100)
    config = QuantConfig.preset("w4a4")
    found = forecast(pipe, config, method="gptq", calibration=settings, processes=2)
    expected = {
        "converting": 6.0,
        "drawing": 100 * 10.0 / 2,
        "means": 100.0,
        "recording": 50.0,
        "solving": (3.0 + 5 * (10.0 + 100)) / 2,
    }
    assert found.processor == sum(expected.values())
    slower = found.seconds / found.processor
    assert found.parts == pytest.approx({name: s * slower for name, s in expected.items()})


def test_what_takes_less_than_a_minute_is_not_looked_into(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantConfig.preset("w4a4")
    monkeypatch.setattr(Probe, "first_pass", lambda self: 1e-4)
    found = forecast(tiny, config, method="rtn", calibration=FEW, briefly=True)
    assert (found.parts, found.time) == ({}, "less than a minute here")
    monkeypatch.setattr(Probe, "first_pass", lambda self: 10.0)
    assert forecast(tiny, config, method="rtn", calibration=FEW, briefly=True).parts


def test_a_rule_for_a_later_block_and_the_model_of_the_caller(make_tiny: Any) -> None:
    pipe = make_tiny(depth=3)
    rule = LayerRule(targets="blocks.2.attn.proj", weight=None)
    config = QuantConfig.preset("w4a4").with_rules(rule)
    before = {name: tensor.clone() for name, tensor in pipe.var.state_dict().items()}
    state = torch.random.get_rng_state()
    forecast(pipe, config, method="gptq", calibration=FEW)
    assert torch.equal(state, torch.random.get_rng_state())
    after = pipe.var.state_dict()
    assert list(after) == list(before) and pipe.var.arch.depth == 3
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_first_blocks_are_the_models_own(any_tiny: Pipeline) -> None:
    var, depth = any_tiny.var, any_tiny.var.arch.depth
    cut = var.first_blocks(1)
    assert cut.arch.depth == 1 and len(list(var.blocks)) == depth
    assert {id(p) for p in cut.parameters()} < {id(p) for p in var.parameters()}
    samples = Run(any_tiny, QuantConfig.preset("w4a4"), FEW).samples
    whole = replace(any_tiny, var=var.first_blocks(depth))
    assert torch.equal(Run(whole, QuantConfig.preset("w4a4"), FEW).samples.tokens, samples.tokens)


def test_records_that_do_not_fit_are_announced(tiny: Pipeline) -> None:
    tight = FEW.replace(memory_gb=1e-6, num_samples=4)
    found = forecast(tiny, QuantConfig.preset("w4a4"), method="gptq", calibration=tight)
    assert found.spooled > 0 and "of files" in found.room


def test_rtn_takes_few_images_where_nobody_says_how_many() -> None:
    said, unsaid = CalibrationConfig(num_samples=7), CalibrationConfig()
    for name, expected in (
        *(("rtn", MEANS_SAMPLES), ("rtn+shift", MEANS_SAMPLES)),
        *(("rtn+reconstruct", 256), ("gptq", 256), ("brecq", 256), ("sas", 256)),
    ):
        method = Method.parse(name)
        assert method.settle(unsaid).num_samples == expected
        assert method.settle(said).num_samples == 7
