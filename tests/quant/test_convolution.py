"""Quantized convolutions: the integers behind the simulated ones, whatever the map and the taps."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.convolutions import Convolution, Taps, convolutions_of, feeds
from varptq.models.pipeline import Pipeline
from varptq.models.presets import preset
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert_autoencoder
from varptq.quant.convolution import (
    LARGEST,
    QuantConvolution,
    channel_scale,
    map_codes,
    weight_codes,
    weight_values,
)
from varptq.quant.find import quant_convolutions
from varptq.runtime.kernels import NormRule
from varptq.runtime.reference_convolution import fused, norm_codes, products, scaled

# Sums of a few hundred float32 terms in two orders.
ROUNDING = 2e-5
TAPS = {
    "3x3": (3, Taps(pads=(1, 1, 1, 1))),
    "1x1": (1, Taps()),
    "down": (3, Taps(stride=2, pads=(0, 1, 0, 1))),
    "up": (3, Taps(pads=(1, 1, 1, 1), upsample=True)),
}


class Case(NamedTuple):
    layer: QuantConvolution
    x: Tensor


def case(kind: str, images: int, side: tuple[int, int], channels: tuple[int, int]) -> Case:
    """A layer, and maps whose means and sizes differ between images."""
    g = torch.Generator().manual_seed(images + 10 * side[1] + 100 * channels[0])
    conv = Convolution(*channels, *TAPS[kind])
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_(generator=g)
    x = torch.randn(images, channels[0], *side, generator=g)
    x = (x + torch.randn(images, 1, 1, 1, generator=g)) * torch.rand(images, 1, 1, 1, generator=g)
    return Case(QuantConvolution(conv, "int8", "conv").requires_grad_(False), x)


def in_integers(layer: QuantConvolution, x: Tensor) -> Tensor:
    codes = map_codes(x.permute(0, 2, 3, 1).contiguous(), "conv")
    assert layer.weight_scale is not None
    exact = products(codes.codes, codes.zero_point, layer.weight, layer.taps)
    return scaled(exact, codes.scale, layer.weight_scale, layer.bias).permute(0, 3, 1, 2)


SIDES = [(2, 2), (2, 5), (3, 3), (7, 13), (16, 17)]


@settings(max_examples=60)
@given(
    st.sampled_from(list(TAPS)),
    st.integers(1, 3),
    st.sampled_from(SIDES),
    st.sampled_from([(1, 1), (3, 13), (37, 3), (32, 32)]),
)
def test_integers_compute_what_is_simulated(
    kind: str, images: int, side: tuple[int, int], channels: tuple[int, int]
) -> None:
    layer, x = case(kind, images, side, channels)
    expected, found = layer(x), in_integers(layer, x)
    assert found.shape == expected.shape
    tolerance = ROUNDING * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@settings(max_examples=30)
@given(st.sampled_from(list(TAPS)), st.integers(1, 4), st.sampled_from(SIDES), st.data())
def test_an_image_does_not_depend_on_its_batch(
    kind: str, images: int, side: tuple[int, int], data: st.DataObject
) -> None:
    layer, x = case(kind, images, side, (5, 7))
    one = data.draw(st.integers(0, images - 1))
    together, alone = map_codes(x, "conv"), map_codes(x[one : one + 1], "conv")
    for whole, part in zip(together, alone, strict=True):
        assert torch.equal(whole[one : one + 1], part)
    assert torch.equal(in_integers(layer, x)[one], in_integers(layer, x[one : one + 1])[0])


@pytest.mark.parametrize("kind", TAPS)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.1])
def test_zeros_around_a_map_are_exact(kind: str, value: float) -> None:
    """A constant map is its own grid, so the result is that of the float input to rounding, borders
    included; of zeros it is the bias."""
    layer, x = case(kind, 2, (4, 4), (3, 4))
    x = torch.full_like(x, value)
    expected = layer.taps.convolve(x, layer.values(torch.float32), layer.bias)
    for found in (layer(x), in_integers(layer, x)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if value == 0.0:
        assert layer.bias is not None
        assert torch.equal(in_integers(layer, x), layer.bias.view(1, -1, 1, 1).expand_as(expected))


def test_codes_of_weights_are_symmetric_and_the_largest_is_exact() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 5, 3, 3, generator=g) * torch.logspace(-30, 20, 9).view(-1, 1, 1, 1)
    weight[4] = 0.0
    scale = channel_scale(weight)
    codes = weight_codes(weight, scale)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    largest = codes.int().abs().amax((1, 2, 3))
    assert largest.tolist() == [LARGEST if i != 4 else 0 for i in range(9)]
    assert torch.equal(weight_codes(-weight, scale), -codes)
    error = (weight_values(codes, scale) - weight).abs().amax((1, 2, 3))
    assert bool((error <= 0.5001 * scale).all())


@pytest.mark.parametrize("silu", [True, False])
def test_codes_of_a_norm_are_those_of_its_values(silu: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((3, 5, 7, 12), (12,), (12,)))
    found = norm_codes(x, NormRule(4, weight, bias, 1e-6, silu), "conv")
    normed = F.group_norm(x.permute(0, 3, 1, 2), 4, weight, bias, 1e-6).permute(0, 2, 3, 1)
    values = F.silu(normed) if silu else normed
    back = (found.codes.float() - found.zero_point.view(-1, 1, 1, 1)) * found.scale.view(
        -1, 1, 1, 1
    )
    assert bool(((back - values).abs() <= 0.501 * found.scale.view(-1, 1, 1, 1)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_map_without_a_range_is_refused_by_name(bad: float) -> None:
    layer, x = case("3x3", 2, (4, 4), (3, 4))
    x[1, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"^layer conv: input holds NaN or infinity$"):
        layer(x)


def nearest_float(exact: Fraction) -> float:
    """By looking at three; of two as near the one that ends in 0."""
    found = np.float32(float(exact))
    around = [found, *(np.nextafter(found, np.float32(end)) for end in (-np.inf, np.inf))]
    last = min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.int32)) & 1))
    return float(last)


@pytest.mark.parametrize("c", [1.0, 2.0**-60, -(2.0**-70), 1.5 * 2.0**-40])
def test_a_sum_with_a_product_is_rounded_once(c: float) -> None:
    g = torch.Generator().manual_seed(0)
    # Products of these lie between two floats, so that the smallest sum decides.
    between = 1 + torch.randint(0, 4096, (1000,), generator=g) * 2.0**-12
    a = torch.cat((between, torch.randn(1000, generator=g)))
    b = torch.cat((torch.full((1000,), 1 + 2.0**-12), torch.randn(1000, generator=g)))
    exact = [
        Fraction(x) * Fraction(y) + Fraction(c) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert fused(a, b, c).tolist() == [nearest_float(one) for one in exact]


def test_a_weight_without_a_range_is_refused_by_name() -> None:
    conv = Convolution(3, 4, 3, Taps())
    conv.weight.data[1, 2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"^layer up: weight holds NaN or infinity"):
        QuantConvolution(conv, "int8", "up")


@pytest.mark.parametrize("kind", TAPS)
def test_the_float_seam_is_a_plain_convolution(kind: str) -> None:
    kernel, taps = TAPS[kind]
    conv, x = Convolution(3, 4, kernel, taps), torch.randn(2, 3, 6, 5)
    padded = F.pad(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3) if taps.upsample else x, taps.pads
    )
    expected = F.conv2d(padded, conv.weight, conv.bias, taps.stride)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(taps.arranged(x), padded)


def test_a_cast_leaves_codes_and_bfloat16_weights() -> None:
    layer, _ = case("3x3", 1, (2, 2), (3, 4))
    codes = layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight is codes
    assert layer.weight_scale is not None and layer.weight_scale.dtype == torch.float32
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    half = QuantConvolution(Convolution(3, 4, 1, Taps()), "bf16", "conv")
    half.to(torch.float64)
    assert half.weight.dtype == torch.bfloat16


def test_what_becomes_codes(tiny: Pipeline) -> None:
    """Everything but the ends; inputs of the decoder alone. The float model is left as it is."""
    vae = convert_autoencoder(tiny.vae, QuantConfig.preset("w4a4"))
    names, found = set(convolutions_of(tiny.vae)), quant_convolutions(vae)
    ends = {f"{net}.conv_{end}" for net in ("encoder", "decoder") for end in ("in", "out")}
    assert set(found) == names - ends
    for name, layer in found.items():
        assert layer.precision == "int8"
        assert layer.on_codes == name.startswith("decoder.")
    assert not quant_convolutions(tiny.vae)
    plain = convert_autoencoder(tiny.vae, QuantConfig.preset("w4a4+paper"))
    assert not quant_convolutions(plain)


def test_rules_choose_by_layer(tiny: Pipeline) -> None:
    config = QuantConfig.preset("w4a4+vae32").with_rules(
        LayerRule(targets="decoder.mid.*", autoencoder="int8"),
        LayerRule(targets="decoder.mid.block_2.*", autoencoder="bf16"),
    )
    found = quant_convolutions(convert_autoencoder(tiny.vae, config))
    assert {name: layer.precision for name, layer in found.items()} == {
        f"decoder.mid.{name}": precision
        for name, precision in (
            *((f"block_1.conv{i}", "int8") for i in (1, 2)),
            *((f"attn_1.{conv}", "int8") for conv in ("qkv", "proj_out")),
            *((f"block_2.conv{i}", "bf16") for i in (1, 2)),
        )
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.replace(autoencoder="int4"),
            r"^QuantConfig: autoencoder is 'int4': Input should be 'float32', 'bf16' or 'int8'$",
        ),
        (
            lambda c: LayerRule.from_dict({"targets": "decoder.*", "autoencoder": "fp8"}),
            r"^LayerRule: autoencoder is 'fp8': Input should be 'float32', 'bf16' or 'int8'$",
        ),
    ],
)
def test_a_wrong_precision_is_one_line(
    change: Callable[[QuantConfig], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        change(QuantConfig.preset("w4a4"))


def test_a_rule_that_matches_no_convolution_is_refused(tiny: Pipeline) -> None:
    rule = LayerRule(targets="decodr.*", autoencoder="bf16")
    config = QuantConfig.preset("w4a4").with_rules(rule)
    expected = r"^rule 'decodr\.\*': matches no layer; layers are named like 'encoder\.conv_in', '"
    with pytest.raises(ConfigError, match=expected):
        convert_autoencoder(tiny.vae, config)


def test_a_config_without_the_field_means_float(tiny: Pipeline) -> None:
    values = QuantConfig.preset("w4a4+vae32").to_dict()
    del values["autoencoder"]
    config = QuantConfig.from_dict(values)
    assert config.autoencoder == "float32"
    assert not quant_convolutions(convert_autoencoder(tiny.vae, config))


@pytest.mark.parametrize("name", ["demo", "demo-text"])
def test_every_norm_before_a_convolution_is_named(name: str) -> None:
    """`feeds` of a network names the convolutions behind a norm, and no others."""
    chosen = preset(name)
    from varptq.models.families import family
    from varptq.models.meta import on_meta

    with on_meta():
        vae = family(chosen.family).build(chosen.transformer_arch, chosen.autoencoder_arch)[1]
    found = feeds(vae)
    assert set(found) < set(convolutions_of(vae))
    behind = {"conv1": "norm1", "conv2": "norm2", "qkv": "norm", "conv_out": "norm_out"}
    for conv in convolutions_of(vae):
        parent, _, child = conv.rpartition(".")
        assert found.get(conv) == (f"{parent}.{behind[child]}" if child in behind else None)
