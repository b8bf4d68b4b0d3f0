"""Transforms fold exactly: float64 oracles, fixed signs, layers that are the same in float."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as hadamard_matrix
from torch import Tensor, nn

from varptq.errors import ConfigError
from varptq.models.scales import Scales
from varptq.models.seams import TokenLinear, spans_of
from varptq.quant.affine import affine_codes, affine_grid, affine_values, to_groups
from varptq.quant.config import InputTransform, LinearSpec, QuantConfig, TensorSpec
from varptq.quant.layers import QuantLinear
from varptq.quant.sign_split import sign_split_codes, sign_split_grid, sign_split_values
from varptq.quant.transforms import (
    centred_bias,
    hadamard,
    rotate_weight,
    signs,
    transformed,
)

SCALES = Scales((1, 2, 3))
BLOCKS = [2, 8, 64, 128]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(block: int) -> Tensor:
    """R as a dense float64 matrix, from scipy's Hadamard matrix."""
    dense = np.diag(signs(block).double().numpy()) @ hadamard_matrix(block) / block**0.5
    return torch.from_numpy(dense)


@pytest.mark.parametrize("block", BLOCKS)
def test_rotation_is_the_signed_hadamard_matrix(block: int) -> None:
    x = noise(3, 5, 3 * block)
    expected = torch.cat([part @ rotation(block) for part in x.split(block, -1)], -1)
    torch.testing.assert_close(hadamard(x, block), expected, rtol=0, atol=1e-13)
    identity = rotation(block) @ rotation(block).T
    torch.testing.assert_close(identity, torch.eye(block).double(), rtol=0, atol=1e-13)


def test_signs_are_fixed_and_mixed() -> None:
    assert signs(16).tolist() == [1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1]
    for block in (64, 128):
        assert abs(float(signs(block).sum())) <= block / 8


@given(seed=st.integers(0, 999), block=st.sampled_from(BLOCKS))
def test_weight_and_input_rotations_cancel(seed: int, block: int) -> None:
    x, weight = noise(4, 2 * block, seed=seed), noise(3, 2 * block, seed=seed + 1)
    rotated = hadamard(x, block) @ rotate_weight(weight, block).T
    torch.testing.assert_close(rotated, x @ weight.T, rtol=1e-12, atol=1e-12)


def test_rotation_is_the_same_for_every_batch_and_in_bfloat16() -> None:
    x = noise(37, 128).float()
    whole = hadamard(x, 64)
    assert torch.equal(torch.cat([hadamard(row, 64) for row in x.split(1)]), whole)
    half = x.bfloat16()
    assert torch.equal(hadamard(half, 64), hadamard(half.float(), 64).bfloat16())


@pytest.mark.parametrize("block", BLOCKS)
def test_rotation_has_the_same_bits_with_a_gradient_and_in_any_layout(block: int) -> None:
    x = noise(2 * block, 5).float().T
    whole = hadamard(x, block)
    assert torch.equal(hadamard(x.contiguous(), block), whole)
    followed = x.clone().requires_grad_()
    rotated = hadamard(followed, block)
    assert torch.equal(rotated, whole)
    rotated.square().sum().backward()
    assert followed.grad is not None  # an orthogonal map keeps lengths
    torch.testing.assert_close(followed.grad, 2 * x, rtol=1e-4, atol=1e-5)


def float_layer(transform: InputTransform, seed: int = 0) -> tuple[nn.Linear, QuantLinear]:
    """A layer whose weight and input stay in float, so that only its transform is left."""
    linear = TokenLinear(192, 7, kind="fc1")
    linear.weight.data, linear.bias.data = noise(7, 192, seed=seed), noise(7, seed=seed + 1)
    spec = LinearSpec(weight=None, input=None, input_transform=transform)
    return linear, QuantLinear(linear, spec, "layer", SCALES.num_scales)


@pytest.mark.parametrize("hadamard_block", [None, 64, 1024])
def test_centred_and_rotated_layers_compute_what_they_did(hadamard_block: int | None) -> None:
    linear, layer = float_layer(InputTransform(center=True, hadamard=hadamard_block))
    layer.set_means(noise(SCALES.num_scales, 192, seed=5))
    x = noise(2, SCALES.num_tokens, 192, seed=6)
    # Means and the bias they make are stored in float32.
    torch.testing.assert_close(layer(x, spans_of(SCALES)), linear(x), rtol=1e-5, atol=1e-5)
    for scale, part in enumerate(SCALES.slices()):
        one = layer(x[:, part], spans_of(SCALES, scale, scale + 1))
        torch.testing.assert_close(one, linear(x[:, part]), rtol=1e-5, atol=1e-5)


def test_the_means_of_a_scale_reach_its_tokens_only() -> None:
    _, layer = float_layer(InputTransform(center=True))
    x = noise(1, SCALES.num_tokens, 192)
    before = layer.fake_input(x, layer._tables(spans_of(SCALES), x.device)[0])
    means = torch.zeros(3, 192)
    means[1] = 1.0
    layer.set_means(means)
    change = layer.fake_input(x, layer._tables(spans_of(SCALES), x.device)[0]) - before
    assert torch.equal(change[0, :, 0], torch.tensor([0.0] + [-1.0] * 4 + [0.0] * 9).double())


def test_centring_removes_the_error_of_a_shared_offset() -> None:
    """Offsets on a few channels cost range; without them the 4-bit error falls several times."""
    linear = TokenLinear(128, 16, kind="fc1")
    x = noise(1, SCALES.num_tokens, 128).float()
    x[..., ::16] += 8.0
    spec = TensorSpec(num_bits=4, strategy="group", group_size=64)
    errors = []
    for transform in (None, InputTransform(center=True)):
        layer = QuantLinear(
            linear, LinearSpec(weight=None, input=spec, input_transform=transform), "layer", 3
        )
        if transform is not None:
            layer.set_means(x.mean((0, 1)).expand(3, -1))
        errors.append(float((layer(x, spans_of(SCALES)) - linear(x)).detach().square().mean()))
    assert errors[1] < errors[0] / 4


def test_centred_bias_is_what_the_mean_becomes() -> None:
    weight, means = noise(3, 24).float(), noise(2, 24, seed=1).float()
    torch.testing.assert_close(centred_bias(weight, means), means @ weight.T)


def test_block_falls_back_to_the_largest_that_divides() -> None:
    transform = InputTransform(hadamard=128)
    rows = (1920, 192, 16, 24, 37)
    assert [transform.block_for(row, "fc1") for row in rows] == [128, 64, 16, 8, None]
    strict = transform.replace(fallback=False)
    assert strict.block_for(1920, "fc1") == 128
    with pytest.raises(ConfigError, match="layer fc1: hadamard 128 does not divide its 192 input"):
        strict.block_for(192, "fc1")
    with pytest.raises(ConfigError, match="power of two"):
        InputTransform(hadamard=96)


def test_a_transform_makes_the_sign_split_input_affine() -> None:
    config = QuantConfig.preset("w4a4+paper+litevar+center")
    assert config.linear_for("blocks.0.ffn.fc2").input is None
    config = QuantConfig.preset("w4a4+paper+rotate+center")
    spec = config.linear_for("blocks.0.ffn.fc2")
    assert spec.input is not None and spec.input.type == "affine"
    assert spec.input_transform == InputTransform(center=True, hadamard=128)


@pytest.mark.parametrize("kind", ["affine", "sign_split"])
@pytest.mark.parametrize(("block", "group"), [(None, None), (64, 64), (32, None), (None, 64)])
def test_codes_of_an_input_are_those_of_its_steps(
    kind: Literal["affine", "sign_split"], block: int | None, group: int | None
) -> None:
    """The values of the codes are the layer's, with gradient and without, and the codes lie in
    range."""
    strategy: Literal["group", "token"] = "group" if group else "token"
    spec = TensorSpec(num_bits=4, type=kind, strategy=strategy, group_size=group)
    x, mean = noise(3, 5, 192).float(), noise(192, seed=1).float()
    rows = to_groups(transformed(x, mean, block), group)
    if kind == "sign_split":
        low, high, sides = -7, 7, sign_split_grid(rows, 4)
        codes = sign_split_codes(rows, sides, 4)
        decoded = sign_split_values(codes, sides)
    else:
        low, high, grid = 0, 15, affine_grid(rows, 4, -1, spec.range_rule)
        codes = affine_codes(rows, grid, 4)
        decoded = affine_values(codes, grid)
    assert torch.equal(codes, codes.round())
    assert low <= float(codes.min()) and float(codes.max()) <= high
    transform = InputTransform(center=True, hadamard=block)
    linear = LinearSpec(weight=None, input=spec, input_transform=transform)
    layer = QuantLinear(TokenLinear(192, 3, kind="fc1"), linear, "layer", 1)
    values = decoded.flatten(2)
    for same in (x, x.clone().requires_grad_()):
        assert torch.equal(layer.fake_input(same, mean), values)
    rotated = hadamard(x - mean, block) if block else x - mean
    grouped = rotated.unflatten(-1, (-1, group)) if group else rotated
    step = (grouped.amax(-1) - grouped.amin(-1)).amax() / 7
    assert float((values - rotated).abs().max()) <= float(step)


def test_a_schedule_with_more_scales_takes_the_last_mean_and_says_so() -> None:
    linear, layer = float_layer(InputTransform(center=True, hadamard=64))
    layer.set_means(noise(SCALES.num_scales, 192, seed=5))
    longer = Scales((1, 2, 3, 4))
    x = noise(2, longer.num_tokens, 192, seed=6)
    with pytest.warns(
        UserWarning, match="scale 4 was not calibrated: means of the finest of 3 scales"
    ):
        found = layer(x, spans_of(longer))
    torch.testing.assert_close(found, linear(x), rtol=1e-5, atol=1e-5)
    mean, gained = layer._tables(spans_of(SCALES), x.device)
    assert mean.shape == (SCALES.num_tokens, 192) and gained.shape == (SCALES.num_tokens, 7)
