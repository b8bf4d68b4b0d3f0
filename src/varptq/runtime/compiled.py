"""The native core inside `torch.compile`: its calls as operators of torch, which a graph can hold.

    varptq::quantize    x, means, rows -> codes, scale, zero_point, sums    of `Rows`
    varptq::linear      codes x packed weight -> y
    varptq::attend      qkv -> answers, over a whole prefix, which needs no cache
    varptq::answer      q, and k and v of texts -> answers

Each runs the function of the same name in `varptq.native`, and has a fake that tells shapes and
dtypes alone. An operator takes tensors and plain values, so a rule is taken apart here and put
together there. Nobody takes this way outside of a graph: to find an operator of torch costs time at
every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varptq.models.rotary import Rotary
from varptq.models.seams import Span
from varptq.native import attention
from varptq.native import linear as linears
from varptq.native.linear import PackedWeight
from varptq.native.quantize import Rows, layout, padded
from varptq.quant.config import AttentionSpec
from varptq.runtime.cpu_scheme import quantized, scheme_of
from varptq.runtime.kernels import AttentionRule, InputRule, Pending

_QUANTIZE = (
    "(Tensor x, Tensor? gain, Tensor? shift, Tensor? means, Tensor? mean_rows, str type, "
    "int num_bits, str range_rule, int? row_group, int? weight_group, bool weight_zero_is_code, "
    "int? block, bool gelu, str layer) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LINEAR = (
    "(Tensor codes, Tensor scale, Tensor zero_point, Tensor sums, int[] row_sizes, bool pairs, "
    "SymInt[] shape, Tensor[] packed, int[] weight_sizes, Tensor? table, Tensor? bias, "
    "Tensor? bias_rows) -> Tensor"
)
_ATTEND = (
    "(Tensor qkv, Tensor q_bias, Tensor v_bias, Tensor q_factor, Tensor? cosine, Tensor? sine, "
    "int heads, int[] bits, str[] types, str policy, bool l2_norm, int max_order, float? theta, "
    "int[] ends, int[] cuts, int[] keys, str layer) -> Tensor"
)

_ANSWER = (
    "(Tensor q, Tensor kv, Tensor v_bias, Tensor q_factor, int heads, int[] bits, str[] types, "
    "str policy, int max_order, float? theta, int[] cuts, str layer) -> Tensor"
)


def quantize(
    x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
) -> Rows:
    """As `Kernels.quantize`."""
    gain, shift = None, None
    if isinstance(x, Pending):
        x, gain, shift = x
    codes, scale, zero_point, sums = torch.ops.varptq.quantize(
        *(x, gain, shift, means, rows, rule.type, rule.num_bits, rule.range_rule, rule.group),
        *(rule.weight_group, rule.weight_zero_is_code, rule.block, rule.gelu, rule.layer),
    )
    row, _, segment = layout(rule.inputs, rule.group, rule.weight_group)
    bits = 8 if rule.codebook else rule.num_bits
    signs = rule.sign_split
    return Rows(codes, scale, zero_point, sums, bits, row, segment, signs, x.shape)


def linear(
    rows: Rows, weight: PackedWeight, bias: Tensor | None, bias_rows: Tensor | None
) -> Tensor:
    """As `Kernels.linear`."""
    return torch.ops.varptq.linear(
        *rows[:4],
        [rows.num_bits, rows.group, rows.segment],
        rows.pairs,
        list(rows.shape),
        list(weight[:4]),
        list(weight[4:10]),
        *(weight.table, bias, bias_rows),
    )


def attend(
    qkv_BLD: Tensor, rule: AttentionRule, spans: Sequence[Span], tables: Rotary | None
) -> Tensor:
    """As `Kernels.attend` with a new cache, which is not kept."""
    spec = rule.spec
    return torch.ops.varptq.attend(
        *(qkv_BLD, rule.q_bias, rule.v_bias, rule.q_factor, *(tables or (None, None))),
        rule.num_heads,
        *_operands(spec),
        *(spec.policy, rule.l2_norm, spec.max_order, rule.theta),
        list(spans[-1].ends),
        _cuts(spans),
        [span.keys for span in spans],
        rule.layer,
    )


def answer(q_RlC: Tensor, kv_RTD: Tensor, rule: AttentionRule, spans: Sequence[Span]) -> Tensor:
    """As `TextKernels.answer`, over keys and values as they come, not as `read` keeps them."""
    spec = rule.spec
    return torch.ops.varptq.answer(
        *(q_RlC, kv_RTD, rule.v_bias, rule.q_factor, rule.num_heads),
        *_operands(spec),
        *(spec.policy, spec.max_order, rule.theta, _cuts(spans), rule.layer),
    )


def _operands(spec: AttentionSpec) -> tuple[list[int], list[str]]:
    """Bits of q, k, v and probabilities, and types of the first three."""
    query, key, value, probability = spec.query, spec.key, spec.value, spec.probability
    # A compiler cannot ask such an object whether it is true.
    assert query is not None and key is not None and value is not None and probability is not None
    operands = (query, key, value)
    bits = [*(operand.num_bits for operand in operands), probability.num_bits]
    return bits, [operand.type for operand in operands]


def _cuts(spans: Sequence[Span]) -> list[int]:
    """Where the queries of each span begin, and where the last ones end."""
    return [0, *(span.queries.stop for span in spans)]


@torch.library.custom_op("varptq::quantize", mutates_args=(), schema=_QUANTIZE)
def _quantize(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gain, shift, means, mean_rows, *said, layer = arguments
    rule = InputRule(layer, x.shape[-1], *said)
    return quantized(x if gain is None else Pending(x, gain, shift), rule, means, mean_rows)[:4]


@_quantize.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    type_, _, _, row_group, weight_group = arguments[4:9]
    inputs = x.shape[-1]
    row, _, segment = layout(inputs, row_group, weight_group)
    rows = x.numel() // inputs * (2 if type_ == "sign_split" else 1)
    groups, segments = inputs // row, inputs // segment
    return (
        x.new_empty((rows, segments * padded(segment)), dtype=torch.uint8),
        x.new_empty((rows, groups), dtype=torch.float32),
        x.new_empty((rows, groups), dtype=torch.int32),
        x.new_empty((rows, segments), dtype=torch.int32),
    )


@torch.library.custom_op("varptq::linear", mutates_args=(), schema=_LINEAR)
def _linear(*arguments: Any) -> Tensor:
    *found, sizes, pairs, shape, packed, weight_sizes, table, bias, bias_rows = arguments
    rows = Rows._make((*found, *sizes, pairs, torch.Size(shape), None))
    weight = PackedWeight._make((*packed, *weight_sizes, table))
    return linears.linear(rows, weight, bias, bias_rows)


@_linear.register_fake
def _(codes: Tensor, *arguments: Any) -> Tensor:
    shape, weight_sizes = arguments[5], arguments[7]
    return codes.new_empty((*shape[:-1], weight_sizes[4]), dtype=torch.float32)


@torch.library.custom_op("varptq::attend", mutates_args=(), schema=_ATTEND)
def _attend(qkv_BLD: Tensor, *arguments: Any) -> Tensor:
    q_bias, v_bias, q_factor, cosine, sine, heads, bits, types, policy = arguments[:9]
    l2_norm, max_order, theta, ends, cuts, keys, layer = arguments[9:]
    scheme = scheme_of(
        heads=heads,
        head_width=len(q_bias) // heads,
        ends=tuple(ends),
        bits=bits,
        types=types,
        policy=policy,
        l2_norm=l2_norm,
        max_order=max_order,
        shift_sum=theta is not None,
    )
    spans = [(slice(*cuts[i : i + 2]), (seen,)) for i, seen in enumerate(keys)]
    return attention.attend(
        scheme,
        qkv_BLD,
        attention.AttentionCache(scheme, len(qkv_BLD)),
        spans,
        query_bias_C=q_bias,
        value_bias_C=v_bias,
        query_factor_H=q_factor,
        tables=None if cosine is None else (cosine, sine),
        theta=theta,
        layer=layer,
    )


@_attend.register_fake
def _(qkv_BLD: Tensor, *arguments: Any) -> Tensor:
    return qkv_BLD.new_empty((*qkv_BLD.shape[:-1], qkv_BLD.shape[-1] // 3), dtype=torch.float32)


@torch.library.custom_op("varptq::answer", mutates_args=(), schema=_ANSWER)
def _answer(q_RlC: Tensor, kv_RTD: Tensor, *arguments: Any) -> Tensor:
    v_bias, q_factor, heads, bits, types, policy, max_order, theta, cuts, layer = arguments
    rows, length, _ = kv_RTD.shape
    scheme = scheme_of(
        heads=heads,
        head_width=len(v_bias) // heads,
        ends=(length,),
        bits=bits,
        types=types,
        policy=policy,
        l2_norm=False,
        max_order=max_order,
        shift_sum=theta is not None,
    )
    cache = attention.AttentionCache(scheme, rows)
    said: dict[str, Any] = {"theta": theta, "layer": layer}
    attention.enter(scheme, kv_RTD, cache, value_bias_C=v_bias, **said)
    spans = [(slice(*cuts[i : i + 2]), (length,)) for i in range(len(cuts) - 1)]
    return attention.answer(scheme, q_RlC, cache, spans, query_factor_H=q_factor, **said)


@_answer.register_fake
def _(q_RlC: Tensor, *arguments: Any) -> Tensor:
    return q_RlC.new_empty(q_RlC.shape, dtype=torch.float32)
