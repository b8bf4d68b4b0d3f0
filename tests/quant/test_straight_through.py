"""Written gradients against the ones autograd derives from the plain quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant import adaround, affine, probability, sign_split, straight_through
from varptq.quant.config import TensorSpec

# Sums of a few hundred float64 terms in another order, relative to the largest gradient.
ROUNDING = 1e-12
Fake = Callable[[Tensor], Tensor]
BITS = st.sampled_from((2, 4, 8))
RULES = st.sampled_from(("with_zero", "min_max", "min_max_clamped"))
DIMS = st.sampled_from((-1, -2, (-2, -1)))


@st.composite
def tensors(draw: Any) -> Tensor:
    """Odd sizes; rows of one sign, ties, halves of steps, zeros, and ranges below the floor."""
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 37))), draw(st.integers(1, 13)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(("plain", "ties", "zeros", "tiny", "large")))
    x = x + draw(st.sampled_from((-3.0, 0.0, 0.2, 3.0)))
    if kind == "ties":
        x = (2 * x).round() / 2
    elif kind == "zeros":
        x[0] = 0.0
    return x * {"tiny": 1e-8, "large": 1e4}.get(kind, 1.0)


def same(ours: Fake, plain: Fake, x: Tensor) -> None:
    """Equal values to the bit, equal gradients up to the order of sums."""
    copies = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [fake(copy) for fake, copy in zip((ours, plain), copies, strict=True)]
    assert torch.equal(*outputs) and outputs[0].dtype == x.dtype
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for output in outputs:
        (output * weights).sum().backward()
    found, expected = (copy.grad for copy in copies)
    assert found is not None and expected is not None
    # Sums cancel, so rounding is measured against what went in as well.
    size = max(float(expected.abs().max()), float(weights.abs().max()))
    assert float((found - expected).abs().max()) <= ROUNDING * size
    with torch.no_grad():
        assert torch.equal(ours(copies[0]), outputs[1].detach())


@given(tensors(), BITS, DIMS, RULES)
def test_affine(x: Tensor, bits: int, dims: affine.Dims, rule: affine.RangeRule) -> None:
    same(
        lambda t: straight_through.affine_fake(t, bits, dims, rule),
        lambda t: affine.affine_fake(t, bits, dims, rule),
        x,
    )


def test_affine_where_codes_are_clamped() -> None:
    """A range of one sign under "min_max_clamped" pushes every code to an end, where no gradient
    passes but that of the scale; the random rows above seldom do."""
    x = torch.linspace(5, 6, 37, dtype=torch.float64).expand(3, 37).contiguous()
    same(
        lambda t: straight_through.affine_fake(t, 4, -1, "min_max_clamped"),
        lambda t: affine.affine_fake(t, 4, -1, "min_max_clamped"),
        x,
    )


@given(tensors(), BITS)
def test_sign_split(x: Tensor, bits: int) -> None:
    same(
        lambda t: straight_through.sign_split_fake(t, bits),
        lambda t: sign_split.sign_split_fake(t, bits),
        x,
    )


@given(tensors(), BITS, st.sampled_from(("log2", "uniform")), st.floats(0.1, 20))
def test_probabilities(x: Tensor, bits: int, rule: Any, sharpness: float) -> None:
    spec = TensorSpec(num_bits=bits, type=rule)
    p = (x.clamp(-50, 50) * sharpness).softmax(-1)
    same(
        lambda t: straight_through.probability_fake(t, spec),
        lambda t: probability.probability_fake(t, spec),
        p,
    )


@given(tensors(), BITS)
def test_rounded_weight(x: Tensor, bits: int) -> None:
    grid = affine.affine_grid(x, bits)
    floor = adaround.floor_codes(x, grid)
    alphas = 2 * adaround.init_alpha(x, grid).nan_to_num(0.0, 9.0, -9.0)
    same(
        lambda a: straight_through.rounded_weight(floor, a, grid, bits),
        lambda a: affine.affine_values(adaround.straight_through_codes(floor, a, bits), grid),
        alphas,
    )


@pytest.mark.parametrize("name", ["affine", "sign_split", "log2", "uniform"])
def test_bfloat16_is_computed_in_float32(name: str) -> None:
    """The gradient of a bfloat16 input is that of the same numbers in float32, rounded once."""
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(0)).softmax(-1).bfloat16()
    fakes: dict[str, Fake] = {
        "affine": lambda t: straight_through.affine_fake(t, 4),
        "sign_split": lambda t: straight_through.sign_split_fake(t, 4),
        "log2": lambda t: straight_through.probability_fake(t, TensorSpec(num_bits=4, type="log2")),
        "uniform": lambda t: straight_through.probability_fake(
            t, TensorSpec(num_bits=8, type="uniform")
        ),
    }
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        fakes[name](leaf).float().sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        gradients.append(leaf.grad.float())
    # 8 bits of mantissa on either side: of the output, which the range's gradient is taken from,
    # and of the gradient itself. That of the range is a sum of 130 such.
    assert float((gradients[0] - gradients[1]).abs().max()) < 0.5
    assert float((gradients[0] - gradients[1]).abs().median()) < 2**-7


def test_there_is_no_second_derivative() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(AssertionError, match="second derivatives"):
        torch.autograd.grad(straight_through.affine_fake(x, 4).sum(), x, create_graph=True)
