"""Means of Linear inputs: against one pass over everything, and set where a config asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import center_inputs, token_means
from varptq.calibrate.quantize import quantize
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.models.pipeline import Pipeline
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears

CONFIG = CalibrationConfig(num_samples=11, steps=0)


@pytest.fixture(scope="module")
def samples(tiny: Pipeline) -> CalibrationSet:
    return calibration_set(tiny, CONFIG, seed=0, resampled=False)


def inputs_of(pipe: Pipeline, name: str, samples: CalibrationSet) -> Tensor:
    """All float inputs of a layer, (rows, tokens, in), from one pass over everything."""
    seen: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = pipe.var.get_submodule(name).register_forward_pre_hook(keep)
    pipe.var(samples.prompts.guided(), pipe.vae.teacher_inputs(samples.tokens).repeat(2, 1, 1))
    handle.remove()
    return seen[0]


def test_means_per_scale_against_one_pass(tiny: Pipeline, samples: CalibrationSet) -> None:
    names = ["word_embed", "blocks.1.attn.proj", "blocks.0.ffn.fc2", "head"]
    means = token_means(tiny, names, samples)
    for name in names:
        inputs = inputs_of(tiny, name, samples).double()
        first = 1 if name == "word_embed" else 0
        offset = tiny.scales.starts[first]
        assert not means[name][:first].any()
        for scale in range(first, tiny.scales.num_scales):
            part = tiny.scales.slices()[scale]
            own = inputs[:, part.start - offset : part.stop - offset]
            torch.testing.assert_close(means[name][scale], own.mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in tiny.var.modules())


def test_only_layers_that_want_them_are_centred(tiny: Pipeline, samples: CalibrationSet) -> None:
    config = QuantConfig.preset("w4a4+paper+center").with_rules(
        LayerRule(targets="*.proj", input_transform=None)
    )
    model = convert(tiny.var, config)
    assert center_inputs(tiny, model, samples) == len(quant_linears(model)) - 2
    for name, layer in quant_linears(model).items():
        assert layer.centred == (not name.endswith("proj"))
        if "ada_lin" in name:
            expected = F.silu(tiny.var.class_emb.weight).mean(0, keepdim=True)
            torch.testing.assert_close(layer.means, expected)


@pytest.mark.parametrize("method", ["rtn", "sas"])
def test_quantize_measures_what_the_config_needs(any_tiny: Pipeline, method: str) -> None:
    config = QuantConfig.preset("w8a8+paper+p8+center+rotate+token")
    result = quantize(any_tiny, config, method=method, calibration=CONFIG)
    for layer in quant_linears(result.var).values():
        assert layer.centred and bool(layer.means.any()) and bool(layer.mean_bias.any())
    labels = torch.tensor([0, 1])
    ids = torch.zeros(2, any_tiny.scales.num_tokens, dtype=torch.int64)
    inputs = any_tiny.vae.teacher_inputs(ids)
    expected, found = any_tiny.var(labels, inputs), result.var(labels, inputs)
    assert float((found - expected).norm() / expected.norm()) < 0.05
