"""Attention policies: what each computes by brute force, and that fixed codes really are fixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varptq.errors import ConfigError
from varptq.models.seams import Span
from varptq.quant.attention import QuantMix, QuantScores, segment_grid
from varptq.quant.config import AttentionSpec, QuantConfig, TensorSpec
from varptq.quant.shift_sum import fixed_codes, shift_sum_codes

ENDS = (1, 5, 14)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spec_of(preset: str) -> AttentionSpec:
    spec = QuantConfig.preset(preset).attention
    assert spec is not None
    return spec


def mix_of(preset: str, theta: float | None = None) -> QuantMix:
    mix = QuantMix(spec_of(preset), "mix")
    mix.theta = theta
    return mix


def seen(*ends: int) -> Span:
    """A span whose queries see the scales that end there, or all."""
    return Span(slice(0, 1), ends or ENDS)


def operands(keys: int = 14, queries: int = 9) -> tuple[Tensor, Tensor]:
    p = noise(2, 3, queries, keys).mul(3).softmax(-1)
    # Tokens of very different size: where a range per token pays.
    size = noise(2, 3, keys, 1, seed=1).mul(0.7).exp()
    return p, noise(2, 3, keys, 64, seed=2) * size


@pytest.mark.parametrize("policy", ["segment", "token"])
def test_codes_of_a_token_never_change(policy: str) -> None:
    """Values of the first scales are the same whether or not later scales are there."""
    mix = mix_of(f"w4a4+paper+{policy}")
    p, v = operands()
    whole = mix.fake_value(p, v, seen())
    for count, end in enumerate(ENDS, 1):
        part = mix.fake_value(p[..., :end], v[:, :, :end], seen(*ENDS[:count]))
        assert torch.equal(part, whole[:, :, :end])
    scores = QuantScores(spec_of(f"w6a6+paper+{policy}"), "scores")
    q = noise(2, 3, 4, 64, seed=3)
    later = scores(q, v, seen())
    assert torch.allclose(scores(q, v[:, :, :5], seen(1, 5)), later[..., :5], atol=1e-5)


def test_release_ranges_change_with_the_cache() -> None:
    mix = mix_of("w4a4+paper")
    p, v = operands()
    part = mix.fake_value(p[..., :5], v[:, :, :5], seen(1, 5))
    assert not torch.equal(mix.fake_value(p, v, seen())[:, :, :5], part)


def test_segments_are_quantized_one_by_one() -> None:
    p, v = operands()
    mix = mix_of("w4a4+paper+segment")
    parts = [
        mix.fake_value(p[..., start:end], v[:, :, start:end], seen(end - start))
        for start, end in zip((0, *ENDS), ENDS, strict=False)
    ]
    assert torch.equal(mix.fake_value(p, v, seen()), torch.cat(parts, 2))
    spec = mix.spec.value
    assert spec is not None and segment_grid(v, spec, ENDS).scale.shape == (2, 3, 14, 1)


@pytest.mark.parametrize("theta", [None, 0.02])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_fold_is_exact_without_probability_codes(
    theta: float | None, renormalize: bool
) -> None:
    """With probabilities in float, folding the token's step in and out leaves p times v^."""
    spec = spec_of("w4a4+paper+token").replace(probability=None, renormalize=renormalize)
    mix = QuantMix(spec, "mix")
    mix.theta = theta
    p, v = operands()
    exact = p @ mix.fake_value(p, v, seen())
    torch.testing.assert_close(mix(p, v, seen()), exact, rtol=1e-4, atol=1e-5)


def test_the_fold_by_brute_force() -> None:
    """Every step of policy "token" with log2 probabilities, one row and key at a time."""
    mix = mix_of("w4a4+paper+token+renorm", theta=0.05)
    p, v = operands(keys=5, queries=2)
    out = mix(p, v, seen(1, 5))
    orders = mix.orders(p)
    spec = mix.spec.value
    assert spec is not None
    grid = mix.value_grid(v, seen(1, 5))
    for b, h, i in [(0, 0, 0), (1, 2, 1)]:
        copies = [2 ** int(orders[b, h, j]) for j in range(5)]
        steps = [float(grid.scale[b, h, j]) / copies[j] for j in range(5)]
        # What the cache holds: one integer on a grid 8 times finer, whatever the order.
        zeros = [int(grid.zero_point[b, h, j]) for j in range(5)]
        wide = [
            (v[b, h, j] / (grid.scale[b, h, j] / 8))
            .round()
            .clamp(-8 * zeros[j], 8 * (15 - zeros[j]))
            for j in range(5)
        ]
        u = [
            wide[j] if copies[j] == 8 else ((wide[j] + 4 // copies[j]) / (8 // copies[j])).floor()
            for j in range(5)
        ]
        folded = [float(p[b, h, i, j]) * steps[j] for j in range(5)]
        exponents = [round(-float(torch.tensor(x / max(folded)).log2())) for x in folded]
        coded = [max(folded) * 2.0**-e if e < 16 else 0.0 for e in exponents]
        total = sum(c / s for c, s in zip(coded, steps, strict=True))
        expected = sum(c * x for c, x in zip(coded, u, strict=True)) / total
        torch.testing.assert_close(out[b, h, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["segment", "token"])
def test_orders_are_read_off_one_integer(policy: str) -> None:
    """Whatever order the attention asks for, a key's values are one of max_order + 1 readings of
    the integer that entered the cache, and the finest is that of `shift_sum_codes`."""
    mix = mix_of(f"w4a4+paper+{policy}")
    v = operands()[1]
    grid = mix.value_grid(v, seen())
    zero = torch.zeros(v.shape[:-1], dtype=torch.int64)
    finest = shift_sum_codes(v, grid, zero + 3, 4)
    assert torch.equal(fixed_codes(v, grid, zero + 3, 4), finest)
    steps = ((finest - grid.zero_point) * 8).round().int()
    for n in range(3):
        expected = ((steps + 2 ** (2 - n)) >> (3 - n)).float() / 2**n
        found = fixed_codes(v, grid, zero + n, 4) - grid.zero_point
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_rows_are_renormalised() -> None:
    p = operands()[0]
    ones = torch.ones(2, 3, 14, 64)
    spec = spec_of("w4a4+paper+renorm").replace(value=None)
    torch.testing.assert_close(QuantMix(spec, "mix")(p, ones, seen()), torch.ones(2, 3, 9, 64))
    plain = QuantMix(spec.replace(renormalize=False), "mix")(p, ones, seen())
    assert not torch.allclose(plain, torch.ones_like(plain), atol=1e-3)


def test_a_range_per_token_serves_tokens_of_unequal_size() -> None:
    p, v = operands()
    exact = p @ v
    errors = [
        float((mix_of(name)(p, v, seen()) - exact).square().mean())
        for name in ("w4a4+paper+p8", "w4a4+paper+p8+segment", "w4a4+paper+p8+token")
    ]
    assert errors[2] < errors[1] < errors[0]


def test_a_policy_says_which_strategies_it_takes() -> None:
    spec = spec_of("w6a6+paper")
    with pytest.raises(ConfigError, match="policy 'token' with key strategy 'channel'"):
        spec.replace(policy="token")
    key = TensorSpec(num_bits=4)
    with pytest.raises(ConfigError, match="policy 'token' with value strategy 'head'"):
        spec.replace(policy="token", key=key)
