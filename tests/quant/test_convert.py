"""Conversion: what is replaced, and what is shared and how."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from varptq.models.pipeline import Pipeline
from varptq.models.seams import Mix, Scores
from varptq.models.var.transformer import VAR
from varptq.quant.attention import QuantMix, QuantScores
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears, quant_mixes, release_float_weights, set_theta
from varptq.quant.layers import QuantLinear

W4A4 = QuantConfig.preset("w4a4+paper")
ALL_FLOAT = W4A4.replace(attention=None).with_rules(LayerRule(targets="*", weight=None, input=None))


def example(pipe: Pipeline) -> tuple[Tensor, Tensor]:
    labels = torch.arange(pipe.var.arch.num_classes + 1)
    later = pipe.scales.num_tokens - pipe.scales.lengths[0]
    generator = torch.Generator().manual_seed(0)
    return labels, torch.randn(len(labels), later, pipe.var.arch.code_dim, generator=generator)


def test_every_linear_and_product_is_replaced(any_tiny: Pipeline) -> None:
    var = any_tiny.var
    linears = [name for name, m in var.named_modules() if isinstance(m, nn.Linear)]
    model = convert(var, W4A4)
    assert list(quant_linears(model)) == linears
    assert all(model.get_submodule(name) is layer for name, layer in quant_linears(model).items())
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert [mix.layer for mix in quant_mixes(model)] == ["blocks.0.attn.mix", "blocks.1.attn.mix"]
    assert sum(isinstance(m, QuantScores) for m in model.modules()) == 2
    # The float model has none of it.
    assert [n for n, m in var.named_modules() if isinstance(m, nn.Linear)] == linears
    assert not quant_linears(var) and not quant_mixes(var)


def test_nothing_quantized_gives_the_float_model(any_tiny: Pipeline) -> None:
    model = convert(any_tiny.var, ALL_FLOAT)
    assert not quant_linears(model)
    assert not any(isinstance(m, QuantScores | QuantMix) for m in model.modules())
    assert torch.equal(model(*example(any_tiny)), any_tiny.var(*example(any_tiny)))


def test_rules_reach_the_layers_they_name(tiny: Pipeline) -> None:
    config = W4A4.with_rules(
        LayerRule(targets="blocks.1.*", weight=None, input=None),
        LayerRule(targets="blocks.1.attn", attention=None),
    )
    model = convert(tiny.var, config)
    assert not any(name.startswith("blocks.1.") for name in quant_linears(model))
    assert type(model.get_submodule("blocks.1.attn.mix")) is Mix
    assert type(model.get_submodule("blocks.1.attn.scores")) is Scores
    assert type(model.get_submodule("blocks.0.attn.mix")) is QuantMix


def test_one_side_may_stay_float(tiny: Pipeline) -> None:
    labels, inputs = example(tiny)
    weight_only = convert(tiny.var, W4A4.with_rules(LayerRule(targets="*", input=None)))
    input_only = convert(tiny.var, W4A4.with_rules(LayerRule(targets="*", weight=None)))
    layer = input_only.get_submodule("head")
    assert isinstance(layer, QuantLinear) and layer.weight_bits is None
    assert layer.weight.data_ptr() == tiny.var.head.weight.data_ptr()
    for model in (weight_only, input_only):
        release_float_weights(model)
        assert model(labels, inputs).isfinite().all()


def test_kept_tensors_share_memory_but_nothing_else(make_tiny: Callable[..., Pipeline]) -> None:
    var = make_tiny().var
    var.requires_grad_(True)
    model = convert(var, W4A4)
    own, theirs = dict(var.named_parameters()), dict(model.named_parameters())
    assert {"pos_1LC", "class_emb.weight", "blocks.0.attn.q_bias", "head.bias"} <= theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.data_ptr() == own[name].data_ptr() and parameter is not own[name], name
        assert not parameter.requires_grad and own[name].requires_grad
    model.to(torch.bfloat16)
    assert {p.dtype for p in var.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    var.double()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_two_conversions_do_not_meet(tiny: Pipeline) -> None:
    first, second = convert(tiny.var, W4A4), convert(tiny.var, W4A4)
    set_theta(first, 0.1)
    quant_linears(first)["head"].codes.zero_()
    assert all(mix.theta is None for mix in quant_mixes(second))
    assert quant_linears(second)["head"].codes.any()
    set_theta(first, None)
    assert all(mix.theta is None for mix in quant_mixes(first))


def test_float_weights_can_be_released(tiny: Pipeline) -> None:
    model = convert(tiny.var, W4A4)
    before = model(*example(tiny))
    release_float_weights(model)
    assert all(layer.float_weight is None for layer in quant_linears(model).values())
    assert torch.equal(model(*example(tiny)), before)
    assert torch.equal(copy.deepcopy(model)(*example(tiny)), before)


def test_a_model_without_memory_gives_one_of_the_same_shapes(any_tiny: Pipeline) -> None:
    with torch.device("meta"):
        empty = convert(VAR(any_tiny.var.arch), W4A4)
    full = convert(any_tiny.var, W4A4)
    shapes = [
        {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
        for model in (empty, full)
    ]
    assert shapes[0] == shapes[1]
    assert all(t.is_meta for t in empty.state_dict().values())
