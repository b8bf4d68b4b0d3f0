"""What a run will take: the parts of every method, how they are multiplied, and no trace left."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from varptq.calibrate.clock import BlockClock
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.forecast import forecast
from varptq.calibrate.methods import MEANS_SAMPLES, Method
from varptq.calibrate.probe import CENTER, CONVERT, DRAW, RECORD, Probe, first_rows
from varptq.calibrate.probe_units import SOLVE, Cost, Costs, saving
from varptq.calibrate.run import Run
from varptq.calibrate.samples import calibration_set
from varptq.calibrate.tune import descend, learnable
from varptq.models.pipeline import Pipeline
from varptq.models.seams import linears_of
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears

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
    def costs(self: Probe) -> Costs:
        found = {CONVERT: Cost(fixed=6.0), DRAW: Cost(each=10.0), SOLVE: Cost(fixed=53.0, each=5.0)}
        return found | {CENTER: Cost(each=1.0), RECORD: Cost(each=0.5)}

    monkeypatch.setattr(Probe, "costs", costs)
    monkeypatch.setattr(Probe, "first_pass", lambda self: 1.0)
    settings = FEW.replace(num_samples=100)
    config = QuantConfig.preset("w4a4")
    found = forecast(make_tiny(), config, method="gptq", calibration=settings, processes=2)
    expected = {
        "converting": 6.0,
        "drawing": 100 * 10.0 / 2,
        "means": 100.0,
        "recording": 50.0,
        "solving": (53.0 + 5 * 100) / 2,
    }
    assert found.processor == sum(expected.values())
    slower = found.seconds / found.processor
    assert found.parts == pytest.approx({name: s * slower for name, s in expected.items()})


def test_the_one_block_counts_for_all(make_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the block are heard, too; a pass that an exception ends is one."""
    clock, stop = iter(range(100)), ValueError("far enough")
    monkeypatch.setattr("varptq.calibrate.clock.now", lambda pipe: float(next(clock)))
    pipe = make_tiny(depth=1)
    heard = BlockClock(pipe, 5)
    block = copy.deepcopy(pipe.var).blocks[0]
    monkeypatch.setattr(type(block), "forward", lambda self, *_: None)
    with heard.spell() as spell:  # 0: begins
        block()  # 1 to 2
        next(clock)  # 3
        monkeypatch.setattr(type(block), "forward", raising(stop))
        with pytest.raises(ValueError, match="far enough"):
            block()  # 4 to 5
    assert (spell.spent, spell.inside) == (6.0, 2.0)
    assert spell.whole == pytest.approx(4.0 + 5 * 2.0)
    assert spell.scaled(0.5) == pytest.approx(3.0 + 5 * 3.0)


@pytest.mark.parametrize("depth", [1, 3])
def test_what_tuning_keeps_is_what_the_whole_model_keeps(make_tiny: Any, depth: int) -> None:
    """Counted on the first block, against all of them."""
    pipe, config = make_tiny(depth=depth), QuantConfig.preset("w4a4+paper")
    tuned = FEW.replace(num_samples=4, tune_steps=1)
    probe = Probe(
        replace(pipe, var=pipe.var.first_blocks(1)), depth, config, Method.parse("rtn"), tuned, True
    )
    probe.first_pass()
    probe.costs()
    quantized, kept = convert(pipe.var, config), list[int]()
    samples = calibration_set(pipe, tuned, seed=0, resampled=False)
    with learnable(quantized) as parameters, saving(kept):
        student = replace(pipe, var=quantized)
        descend(pipe, student, samples, parameters, tuned, torch.Generator(), None)
    weights = {4 * x.in_features * x.out_features for x in quant_linears(quantized).values()}
    assert probe.tuning == pytest.approx(sum(n for n in kept if n not in weights), rel=0.1)


def raising(error: Exception) -> Callable[..., None]:
    def forward(*_: Any) -> None:
        raise error

    return forward


@pytest.mark.parametrize("name", ["w4a4", "w4a4+groups", "w4a4+paper+litevar"])
def test_what_stands_in_for_the_quantized_block_is_as_large(make_tiny: Any, name: str) -> None:
    """Of the rows of a few, as many as there are in truth."""
    config, pipe = QuantConfig.preset(name), make_tiny(depth=1)
    truth = quant_linears(convert(pipe.var, config))
    few, share = first_rows(linears_of(pipe.var)["blocks.0.ffn.fc1"], 100)
    assert 0 < share < 1 and len(few.weight) == few.out_features
    probe = Probe(pipe, 1, config, Method.parse("rtn"), FEW, draws=True)
    found, seconds = probe.converted(100)
    assert seconds > 0
    layers = quant_linears(found)
    assert layers.keys() == truth.keys()
    for layer, own in layers.items():
        wanted = truth[layer].state_dict()
        assert {key: t.shape for key, t in own.state_dict().items()} == {
            key: t.shape for key, t in wanted.items()
        }
        assert own.float_weight is not None
        assert own.float_weight.shape == (own.out_features, own.in_features)


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
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.var.modules())
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
