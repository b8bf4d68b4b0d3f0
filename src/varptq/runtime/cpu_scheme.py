"""Rules of a quantized model in the words of the native core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from varptq.models.seams import LAYER_NORM_EPS
from varptq.native.attention import AttentionScheme
from varptq.native.quantize import Codebook, Norm, Rows, quantize
from varptq.quant.codebook import HALVES, reach
from varptq.quant.quantizers import QUANTIZERS
from varptq.runtime.kernels import AttentionRule, InputRule, Pending


def scheme(rule: AttentionRule, ends: tuple[int, ...] = ()) -> AttentionScheme:
    """The attention of one layer; a cache needs `ends`."""
    spec = rule.spec
    assert spec.query and spec.key and spec.value and spec.probability
    assert spec.policy != "release"
    operands = (spec.query, spec.key, spec.value)
    return scheme_of(
        heads=rule.num_heads,
        head_width=rule.head_width,
        ends=ends,
        bits=[*(operand.num_bits for operand in operands), spec.probability.num_bits],
        types=[operand.type for operand in operands],
        policy=spec.policy,
        l2_norm=rule.l2_norm,
        max_order=spec.max_order,
        shift_sum=rule.theta is not None,
    )


def scheme_of(*, bits: Sequence[int], types: Sequence[str], **rest: Any) -> AttentionScheme:
    """The same from plain values; bits: of queries, keys, values and probabilities, types: of the
    first three, rest: the other fields."""
    books = [book(type_, count) for type_, count in zip(types, bits, strict=False)]
    widths = ("query_bits", "key_bits", "value_bits", "probability_bits")
    tables = ("query_book", "key_book", "value_book")
    return AttentionScheme(
        **rest, **dict(zip(widths, bits, strict=True)), **dict(zip(tables, books, strict=True))
    )


def book(type_: str, num_bits: int) -> Codebook | None:
    """The codebook of a type; None for a type that has none."""
    if QUANTIZERS[type_].table is None:
        return None
    return Codebook(HALVES[num_bits], reach(num_bits))


def quantized(
    x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
) -> Rows:
    """As `Kernels.quantize`."""
    norm = None
    if isinstance(x, Pending):
        x, norm = x.x_BLC, Norm(x.scale_B1C, x.shift_B1C, LAYER_NORM_EPS)
    return quantize(
        x,
        num_bits=rule.num_bits,
        row_group=rule.group,
        weight_group=rule.weight_group,
        sign_split=rule.sign_split,
        codebook=book(rule.type, rule.num_bits),
        norm=norm,
        gelu=rule.gelu,
        means=means,
        mean_rows=rows,
        hadamard=rule.block,
        layer=rule.layer,
    )
