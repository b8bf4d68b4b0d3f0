"""Rules of a quantized model in the words of the native core."""

from __future__ import annotations

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
    return AttentionScheme(
        heads=rule.num_heads,
        head_width=rule.head_width,
        ends=ends,
        policy=spec.policy,
        query_bits=spec.query.num_bits,
        key_bits=spec.key.num_bits,
        value_bits=spec.value.num_bits,
        probability_bits=spec.probability.num_bits,
        l2_norm=rule.l2_norm,
        max_order=spec.max_order,
        query_book=book(spec.query.type, spec.query.num_bits),
        key_book=book(spec.key.type, spec.key.num_bits),
        value_book=book(spec.value.type, spec.value.num_bits),
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
