"""Conversion: what is replaced, what is shared and how, and the BOP account by loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from varptq.models.pipeline import Pipeline, build_model
from varptq.models.seams import Mix, Scores
from varptq.models.var.transformer import VAR
from varptq.quant.attention import QuantMix, QuantScores
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import (
    bops_account,
    convert,
    describe_linears,
    describe_products,
    quant_linears,
    quant_mixes,
    release_float_weights,
    set_theta,
)
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


def bops_by_loops(var: VAR, config: QuantConfig) -> int:
    """Term by term: scales, blocks, heads; 16 bits where a side stays float."""
    arch, total = var.arch, 0

    def bits(spec: object) -> int:
        return 16 if spec is None else spec.num_bits

    def linear(name: str, tokens: int) -> int:
        out_features, in_features = var.get_submodule(name).weight.shape
        spec = config.linear_for(name)
        return out_features * in_features * tokens * bits(spec.weight) * bits(spec.input)

    seen = 0
    for scale, side in enumerate(arch.scales.sides):
        queries = side * side
        seen += queries
        total += linear("head", queries) + linear("head_nm.ada_lin.1", 1)
        total += linear("word_embed", queries if scale > 0 else 0)
        if arch.shared_adaln:
            total += linear("shared_ada_lin.1", 1)
        for i in range(arch.depth):
            name = f"blocks.{i}"
            if not arch.shared_adaln:
                total += linear(f"{name}.ada_lin.1", 1)
            for layer in ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2"):
                total += linear(f"{name}.{layer}", queries)
            spec = config.attention_for(f"{name}.attn")
            for _ in range(arch.num_heads):
                macs = queries * seen * (arch.width // arch.num_heads)
                total += macs * bits(spec and spec.query) * bits(spec and spec.key)
                total += macs * bits(spec and spec.probability) * bits(spec and spec.value)
    return total


@pytest.fixture(scope="module")
def demo() -> VAR:
    return build_model("demo").var


@pytest.mark.parametrize(
    "preset", ["w4a4+paper", "w6a6+paper+litevar", "w4a8+paper+skip-head", "w3a5+paper+p8+released"]
)
def test_the_account_equals_loops(demo: VAR, any_tiny: Pipeline, preset: str) -> None:
    config = QuantConfig.preset(preset)
    for var in (demo, any_tiny.var):
        assert bops_account(var, config).total == bops_by_loops(var, config)


def test_float_attention_counts_16_bits(tiny: Pipeline) -> None:
    config = W4A4.with_rules(LayerRule(targets="blocks.0.attn", attention=None))
    assert bops_account(tiny.var, config).total == bops_by_loops(tiny.var, config)


def test_what_stays_float_costs_more(demo: VAR) -> None:
    totals = {
        name: bops_account(demo, QuantConfig.preset(name)).total
        for name in (
            "w4a4+paper",
            "w4a4+paper+litevar",
            "w4a4+paper+p8",
            "w6a6+paper",
            "w8a8+paper",
        )
    }
    assert totals["w4a4+paper"] < totals["w4a4+paper+litevar"]
    assert totals["w4a4+paper"] < totals["w4a4+paper+p8"]
    assert totals["w4a4+paper"] < totals["w6a6+paper"] < totals["w8a8+paper"]
    whole = bops_account(demo, QuantConfig.preset("w8a8+paper"))
    assert bops_account(demo, None).total == whole.float_total == 4 * whole.total


def test_a_converted_model_is_described_as_its_float_one(any_tiny: Pipeline) -> None:
    model = convert(any_tiny.var, W4A4)
    for describe in (describe_linears, describe_products):
        assert list(describe(model, W4A4)) == list(describe(any_tiny.var, W4A4))
    assert bops_account(model, W4A4) == bops_account(any_tiny.var, W4A4)


def test_an_online_rotation_has_its_price(tiny: Pipeline) -> None:
    """log2 of the block additions per channel and token at 16 bits, none in the float model."""
    plain, rotated = (
        bops_account(tiny.var, QuantConfig.preset(name))
        for name in ("w8a8+paper", "w8a8+paper+rotate")
    )
    additions = sum(
        layer.in_features
        * layer.tokens_per_image
        * int(math.log2(math.gcd(128, layer.in_features)))
        for layer in describe_linears(tiny.var, None)
    )
    assert rotated.total - plain.total == 16 * additions
    assert rotated.float_total == plain.float_total
