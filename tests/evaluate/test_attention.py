"""Product errors: zero for the product itself, brute force, and what moves them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.var_oracle import both_rows, trace
from varptq.evaluate.attention import Product, product_errors
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.seams import Span, spans_of
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_mixes, set_theta

LABELS = torch.tensor([0, 3, 4])


def ids_of(pipe: Pipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 32, (len(LABELS), pipe.scales.num_tokens), generator=generator)


def exact(p: Tensor, v: Tensor, _: Span) -> Tensor:
    return p @ v


def coarse(p: Tensor, v: Tensor, _: Span) -> Tensor:
    return (p * 8).round() / 8 @ v


def shifted(p: Tensor, v: Tensor, _: Span) -> Tensor:
    return p @ (v + 0.01)


def quant_products(pipe: Pipeline, preset: str, theta: float | None = None) -> list[Product]:
    model = convert(pipe.var, QuantConfig.preset(preset))
    set_theta(model, theta)
    return list(quant_mixes(model))


def test_the_product_itself_has_no_error(any_tiny: Pipeline) -> None:
    errors = product_errors(any_tiny, [exact, exact], LABELS, ids_of(any_tiny))
    assert errors.shape == (2, 3) and errors.dtype == torch.float64
    assert not errors.any()


def brute_force(pipe: Pipeline, products: list[Product]) -> Tensor:
    """Squared differences over squared values, row by row and head by head, in float64."""
    found = trace(pipe.var, *both_rows(pipe, LABELS, ids_of(pipe)))
    errors = torch.zeros(len(products), pipe.scales.num_scales, dtype=torch.float64)
    for block, product in enumerate(products):
        for span, part in zip(spans_of(pipe.scales), pipe.scales.slices(), strict=True):
            wrong = size = 0.0
            for row in range(2 * len(LABELS)):
                for head in range(pipe.var.arch.num_heads):
                    p = found.probabilities[block][row, head, part, : part.stop]
                    v = found.values[block][row, head, : part.stop]
                    wrong += float((product(p, v, span) - p @ v).square().sum())
                    size += float((p @ v).square().sum())
            errors[block, span.scale] = wrong / size
    return errors


def test_errors_equal_brute_force(any_tiny: Pipeline) -> None:
    products: list[Product] = [coarse, shifted]
    ours = product_errors(any_tiny, products, LABELS, ids_of(any_tiny))
    torch.testing.assert_close(ours, brute_force(any_tiny, products), rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_one_scale(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny(scales=Scales((3,)), depth=1)
    ours = product_errors(pipe, [coarse], LABELS, ids_of(pipe))
    torch.testing.assert_close(ours, brute_force(pipe, [coarse]), rtol=1e-3, atol=1e-9)


def test_more_bits_and_more_copies_are_nearer(tiny: Pipeline) -> None:
    ids = ids_of(tiny)
    means = [
        float(product_errors(tiny, quant_products(tiny, preset), LABELS, ids).mean())
        for preset in ("w4a4+paper", "w6a6+paper", "w8a8+paper", "w8a8+paper+p8")
    ]
    assert means == sorted(means, reverse=True) and means[0] > 10 * means[-1] > 0
    plain, copies = (
        product_errors(tiny, quant_products(tiny, "w4a4+paper+p8", theta), LABELS, ids).mean()
        for theta in (None, 1e-6)
    )
    assert copies < plain / 10  # eight copies: a step eight times finer


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_on_the_float_model(tiny: Pipeline, fails: bool) -> None:
    def fail(p: Tensor, v: Tensor, _: Span) -> Tensor:
        raise RuntimeError("no product")

    products: list[Product] = [exact, fail if fails else exact]
    if fails:
        with pytest.raises(RuntimeError, match="no product"):
            product_errors(tiny, products, LABELS, ids_of(tiny))
    else:
        product_errors(tiny, products, LABELS, ids_of(tiny))
    assert not any(module._forward_hooks for module in tiny.var.modules())
