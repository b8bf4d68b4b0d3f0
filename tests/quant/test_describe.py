"""Description: bit operations against loops, and a converted model as its float one."""

from __future__ import annotations

import math

import pytest

from varptq.models.pipeline import Pipeline, build_model
from varptq.models.var.transformer import VAR
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.describe import bops_account, describe_linears, describe_products

W4A4 = QuantConfig.preset("w4a4+paper")


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
    for scale, queries in enumerate(arch.scales.lengths):
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
