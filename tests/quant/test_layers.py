"""Simulated layers: block-causal equals scale by scale, weights, non-finite inputs, casting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.blocks import Attention
from varptq.models.scales import Scales
from varptq.models.seams import LayerCache, Span, TokenLinear, spans_of
from varptq.models.var.transformer import VAR, VARArch, randomize
from varptq.quant.config import LayerRule, LinearSpec, QuantConfig, TensorSpec
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears, quant_mixes, set_theta
from varptq.quant.layers import QuantLinear

ARCH = VARArch(
    num_classes=3,
    depth=2,
    width=128,
    num_heads=2,
    scales=Scales((1, 2, 3)),
    codebook_size=32,
    code_dim=8,
    l2_norm=True,
    shared_adaln=False,
)


@pytest.fixture(scope="module")
def var() -> VAR:
    model = VAR(ARCH)
    randomize(model, torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["w6a6+paper", "w4a4+paper", "w8a8+paper+p8"])
@pytest.mark.parametrize("theta", [None, 0.05])
def test_one_pass_over_all_scales_equals_the_cached_loop(
    var: VAR, preset: str, theta: float | None
) -> None:
    """Every query scale sees keys and values on the ranges of its own prefix.

    float64, and proj's input left in float: re-quantizing sums on a grid meets exact ties.
    """
    config = QuantConfig.preset(preset).with_rules(LayerRule(targets="blocks.*.proj", input=None))
    model = convert(var, config)
    set_theta(model, theta)
    attention = model.get_submodule("blocks.0.attn").double()
    assert isinstance(attention, Attention)
    x_BLC = noise(2, ARCH.scales.num_tokens, ARCH.width).double()
    whole = attention(x_BLC, spans_of(ARCH.scales))
    shape = (2, ARCH.num_heads, ARCH.scales.num_tokens, ARCH.head_width)
    cache = LayerCache(torch.empty(shape).double(), torch.empty(shape).double())
    for scale, part in enumerate(ARCH.scales.slices()):
        step = attention(x_BLC[:, part], spans_of(ARCH.scales, scale, scale + 1), cache)
        torch.testing.assert_close(step, whole[:, part], rtol=1e-10, atol=1e-10)


def test_copies_bring_the_product_closer(var: VAR) -> None:
    model = convert(var, QuantConfig.preset("w4a4+paper"))
    mix = quant_mixes(model)[0]
    p, v = noise(1, 2, 4, 5).mul(3).softmax(-1), noise(1, 2, 5, 64, seed=1)
    errors, span = [], Span(slice(0, 4), (5,))
    for theta in (None, 0.5, 0.05, 1e-6):
        mix.theta = theta
        errors.append(float((mix.fake_value(p, v, span) - v).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 30


def test_weight_is_what_the_codes_say(var: VAR) -> None:
    for preset in ("w4a4+paper", "w3a8+paper", "w8a8+paper"):
        for layer in quant_linears(convert(var, QuantConfig.preset(preset))).values():
            assert layer.float_weight is not None and layer.weight_bits is not None
            assert int(layer.codes.max()) <= 2**layer.weight_bits - 1
            error = (
                (layer.dequantized() - layer.float_weight)
                .abs()
                .unflatten(1, (layer.codes_grouped.shape[1], -1))
            )
            assert bool((error <= layer.scale.unsqueeze(-1) * 0.5001).all())


@given(bits=st.integers(2, 8), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_learned_rounding_starts_at_the_float_weight(bits: int, rows: int, seed: int) -> None:
    linear = nn.Linear(24, rows, bias=False)
    linear.weight.data = noise(rows, 24, seed=seed)
    spec = LinearSpec(weight=TensorSpec(num_bits=bits, strategy="channel"), input=None)
    layer = QuantLinear(linear, spec, "layer")
    nearest = layer.dequantized()
    rounding = layer.start_rounding(hard=False)
    # The ends of a range round to a code whose value can pass the range by half a step.
    bound = 0.51 * layer.scale
    assert bool(((rounding.weight() - linear.weight).abs() <= bound).all())
    layer.finish_rounding()
    assert bool(((layer.dequantized() - nearest).abs() <= 1.001 * layer.scale).all())
    assert layer.rounding is None


def test_non_finite_inputs_are_refused_by_layer(var: VAR) -> None:
    model = convert(var, QuantConfig.preset("w4a4+paper"))
    inputs = torch.zeros(1, ARCH.scales.num_tokens - 1, ARCH.code_dim)
    for bad in (torch.nan, torch.inf):
        inputs[0, 3, 2] = bad
        with pytest.raises(NonFiniteError, match="layer word_embed: input holds NaN"):
            model(torch.tensor([0]), inputs)


def test_non_finite_weights_are_refused_by_tensor(var: VAR) -> None:
    broken = convert(var, QuantConfig.preset("w8a8+paper"))  # a copy to damage
    del broken
    weight = var.blocks[1].ffn.fc1.weight
    kept = float(weight[0, 0])
    weight[0, 0] = torch.nan
    try:
        with pytest.raises(NonFiniteError, match=r"tensor blocks\.1\.ffn\.fc1\.weight"):
            convert(var, QuantConfig.preset("w4a4+paper"))
    finally:
        weight[0, 0] = kept


def test_group_size_that_does_not_divide_names_the_layer(var: VAR) -> None:
    config = QuantConfig.preset("w4a4+paper")
    assert config.linear.weight is not None
    spec = config.linear.weight.replace(group_size=96, fallback=False)
    config = config.replace(linear=config.linear.replace(weight=spec))
    with pytest.raises(ConfigError, match=r"layer [\w.]+: group_size 96"):
        convert(var, config)


def test_a_rule_that_matches_nothing_is_refused(var: VAR) -> None:
    config = QuantConfig.preset("w4a4+paper").with_rules(
        LayerRule(targets="blocks.*.mlp.*", input=None)
    )
    with pytest.raises(ConfigError, match=r"rule 'blocks\.\*\.mlp\.\*': matches no layer"):
        convert(var, config)


def test_conversion_shares_what_stays_float_and_leaves_the_model_alone(var: VAR) -> None:
    before = {name: tensor.clone() for name, tensor in var.state_dict().items()}
    model = convert(var, QuantConfig.preset("w4a4+paper+litevar"))
    assert model.pos_1LC.data_ptr() == var.pos_1LC.data_ptr()
    assert model.blocks[0].ffn.fc2 is not var.blocks[0].ffn.fc2
    assert type(model.blocks[0].ffn.fc2) is TokenLinear
    kept, own = model.blocks[0].ffn.fc2.weight, var.blocks[0].ffn.fc2.weight
    assert kept.data_ptr() == own.data_ptr()
    for name, tensor in var.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_scales_stay_float32_when_the_model_is_cast(var: VAR) -> None:
    model = convert(var, QuantConfig.preset("w4a4+paper"))
    codes = {name: layer.codes.clone() for name, layer in quant_linears(model).items()}
    model.to(torch.bfloat16)
    for name, layer in quant_linears(model).items():
        assert layer.scale.dtype == torch.float32
        assert layer.codes.dtype == torch.uint8 and torch.equal(layer.codes, codes[name])
