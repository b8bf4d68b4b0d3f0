"""What does not fit is refused on this side of the C interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from varptq.errors import InputError
from varptq.native import attention, binding
from varptq.native.linear import PackedWeight, linear, pack
from varptq.native.phi import add_phi
from varptq.native.quantize import Rows, quantize

pytestmark = pytest.mark.skipif(binding.core() is None, reason=binding.reason() or "built")

INPUTS, OUTPUTS = 64, 3


def packed() -> PackedWeight:
    codes = torch.zeros(OUTPUTS, INPUTS, dtype=torch.uint8)
    ones = torch.ones(OUTPUTS, 1)
    return pack(codes, ones, torch.zeros(OUTPUTS, 1), num_bits=4)


def quantized() -> Rows:
    return quantize(torch.ones(2, INPUTS), num_bits=4)


def product(**changes: object) -> torch.Tensor:
    """A product with fields of rows (`rows_*`) or of the weight replaced."""
    rows, weight = quantized(), packed()
    for name, value in changes.items():
        if name.startswith("rows_"):
            rows = rows._replace(**{name.removeprefix("rows_"): value})
        else:
            weight = weight._replace(**{name: value})
    return linear(rows, weight)


def attend(cache_rows: int = 2, **changes: Any) -> torch.Tensor:
    scheme = attention.AttentionScheme(2, 16, (1, 5), "token", 4, 4, 4, 4, l2_norm=False)
    operands: dict[str, Any] = {
        "query_bias_C": torch.zeros(32),
        "value_bias_C": torch.zeros(32),
        "query_factor_H": torch.ones(2),
        **changes,
    }
    cache = attention.AttentionCache(scheme, cache_rows)
    qkv = torch.zeros(2, 1, 96)
    return attention.attend(scheme, qkv, cache, [(slice(0, 1), (1,))], **operands)


def over_text(kv: torch.Tensor | None = None, q: torch.Tensor | None = None) -> torch.Tensor:
    scheme = attention.AttentionScheme(2, 16, (3,), "token", 4, 4, 4, 4, l2_norm=False)
    cache = attention.AttentionCache(scheme, 2)
    kv, q = torch.zeros(2, 3, 64) if kv is None else kv, torch.zeros(2, 1, 32) if q is None else q
    attention.enter(scheme, kv, cache, value_bias_C=torch.zeros(32))
    return attention.answer(scheme, q, cache, [(slice(0, 1), (3,))], query_factor_H=torch.ones(2))


CALLS: dict[str, Callable[[], object]] = {
    "input on meta": lambda: quantize(torch.ones(2, INPUTS, device="meta"), num_bits=4),
    "means of float64": lambda: quantize(
        torch.ones(2, INPUTS), num_bits=4, means=torch.zeros(1, INPUTS, dtype=torch.float64)
    ),
    "short means": lambda: quantize(
        torch.ones(2, INPUTS), num_bits=4, means=torch.zeros(1, INPUTS - 1)
    ),
    "row of no mean": lambda: quantize(
        torch.ones(1, 2, INPUTS),
        num_bits=4,
        means=torch.zeros(2, INPUTS),
        mean_rows=torch.tensor([0, 2], dtype=torch.int32),
    ),
    "scale of bfloat16": lambda: product(scale=packed().scale.bfloat16()),
    "short weight": lambda: product(packed=packed().packed[:-1]),
    "weight on meta": lambda: product(packed=packed().packed.to("meta")),
    "scale of rows in float64": lambda: product(rows_scale=quantized().scale.double()),
    "fewer sums": lambda: product(rows_sums=quantized().sums[:1]),
    "short bias": lambda: linear(quantized(), packed(), torch.zeros(OUTPUTS, dtype=torch.float64)),
    "small cache": lambda: attend(cache_rows=1),
    "biases of other size": lambda: attend(value_bias_C=torch.zeros(31)),
    "factor on meta": lambda: attend(query_factor_H=torch.ones(2, device="meta")),
    "tables of fewer tokens": lambda: attend(tables=(torch.ones(4, 8), torch.ones(4, 8))),
    "tables of other heads": lambda: attend(tables=(torch.ones(5, 8), torch.ones(5, 9))),
    "text of other width": lambda: over_text(kv=torch.zeros(2, 3, 63)),
    "another text's rows": lambda: over_text(kv=torch.zeros(1, 3, 64)),
    "queries of other width": lambda: over_text(q=torch.zeros(2, 1, 31)),
    "queries of fewer rows": lambda: over_text(q=torch.zeros(1, 1, 32)),
    "phi of other size": lambda: add_phi(
        torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 2, 2), torch.zeros(4, 4, 3, 3), torch.zeros(4)
    ),
}


def test_what_fits_is_computed() -> None:
    assert product().shape == (2, OUTPUTS)
    assert attend().shape == over_text().shape == (2, 1, 32)


@pytest.mark.parametrize("name", CALLS)
def test_a_foreign_tensor_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="native core, ") as raised:
        CALLS[name]()
    assert "\n" not in str(raised.value)
