"""The attention products of runtime "reference": integers where `quant.attention` has dequantized
floats.

    score = (sum over c of uq uk) sq sk,   u = code - zero point
    out   = (sum over tokens of p code, u) times the scales, after the policy of the values

Policies "token" and "segment" cache codes, which never change; "release" (and keys per channel)
caches floats and quantizes them again whenever the cache grows. A scale along the axis that is
summed (keys per channel, log2 probabilities) requires a sum in float64. Rows of the batch are
computed one by one. Shapes as in models/seams.py, without B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.models.rotary import Rotary
from varptq.models.seams import Span
from varptq.quant.affine import LEAST_SCALE, Grid, affine_grid, wide
from varptq.quant.config import TensorSpec
from varptq.quant.log2 import log2_codes, log2_values
from varptq.quant.quantizers import QUANTIZERS
from varptq.quant.shift_sum import copies_of, orders, shift_sum_codes, token_scores
from varptq.quant.uniform import row_max, uniform_codes, uniform_scale
from varptq.runtime.kernels import AttentionRule


class Integers(NamedTuple):
    """u = code - zero point, integers (H, l, c) in int64, and their scale: value = scale * u."""

    u: Tensor
    scale: Tensor


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of integers, exact: in int32 if that can hold every sum, else in int64."""
    largest = int(a.abs().max()) * int(b.abs().max()) * a.shape[-1]
    dtype = torch.int32 if largest < 2**31 else torch.int64
    return a.to(dtype) @ b.to(dtype)


class Cache:
    """What one block caches for every row of the batch: named tensors (H, l, n), one per call."""

    def __init__(self, rows: int) -> None:
        self.rows: list[dict[str, list[Tensor]]] = [{} for _ in range(rows)]
        self.length = 0

    def first_rows(self, rows: int) -> Cache:
        """The same for the first `rows` rows, which it shares."""
        shared = Cache(0)
        shared.rows, shared.length = self.rows[:rows], self.length
        return shared

    def append(self, row: int, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.rows[row].setdefault(name, []).append(tensor)

    def first(self, row: int, name: str, num_tokens: int) -> Tensor:
        return torch.cat(self.rows[row][name], dim=1)[:, :num_tokens]


def refuse(rule: AttentionRule) -> str | None:
    spec = rule.spec
    for name in ("query", "key", "probability", "value"):
        if getattr(spec, name) is None:
            return f"{name} in float"
    return None


def attend(
    qkv_BlD: Tensor,
    rule: AttentionRule,
    cache: Cache,
    spans: Sequence[Span],
    tables: Rotary | None = None,
) -> Tensor:
    """`Kernels.attend`."""
    rule.check_finite(qkv_BlD)
    places = slice(cache.length, cache.length + qkv_BlD.shape[1])
    outputs: list[Tensor] = []
    for row, qkv_lD in enumerate(qkv_BlD.float()):
        q_Hlc, k_Hlc, v_Hlc = split(qkv_lD, rule)
        if tables is not None:
            q_Hlc, k_Hlc = tables.turn(q_Hlc, places), tables.turn(k_Hlc, places)
        _store(cache, row, k_Hlc, v_Hlc, rule, spans)
        outputs.append(_outputs(q_Hlc, rule, cache, row, spans))
    cache.length = places.stop
    return torch.stack(outputs)


def read(kv_RTD: Tensor, rule: AttentionRule) -> Cache:
    """`TextKernels.read`."""
    rule.check_finite(kv_RTD)
    rows, length, _ = kv_RTD.shape
    cache = Cache(rows)
    for row, kv_TD in enumerate(kv_RTD.float()):
        k_TC, v_TC = kv_TD.chunk(2, dim=-1)
        k_HTc, v_HTc = _heads(k_TC, rule), _heads(v_TC + rule.v_bias, rule)
        _store(cache, row, k_HTc, v_HTc, rule, [Span(slice(0, length), (length,))])
    cache.length = length
    return cache


def answer(q_RlC: Tensor, rule: AttentionRule, cache: Cache, spans: Sequence[Span]) -> Tensor:
    """`TextKernels.answer`."""
    rule.check_finite(q_RlC)
    outputs: list[Tensor] = []
    for row, q_lC in enumerate(q_RlC.float()):
        q_Hlc = _heads(q_lC, rule) * rule.q_factor.view(-1, 1, 1)
        outputs.append(_outputs(q_Hlc, rule, cache, row, spans))
    return torch.stack(outputs)


def _heads(x_lC: Tensor, rule: AttentionRule) -> Tensor:
    """(l, C) -> (H, l, c)."""
    shape = (rule.num_heads, rule.head_width)
    return x_lC.unflatten(-1, shape).transpose(0, 1).contiguous()


def _outputs(
    q_Hlc: Tensor, rule: AttentionRule, cache: Cache, row: int, spans: Sequence[Span]
) -> Tensor:
    """(l, C) of one row's queries over what it has in the cache."""
    out_Hlc = [
        _mix(_probabilities(q_Hlc[:, s.queries], cache, row, s.keys, rule), cache, row, rule, s)
        for s in spans
    ]
    return torch.cat(out_Hlc, dim=1).transpose(0, 1).flatten(1)


def split(qkv_lD: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (H, l, c) as `Attention._qkv` makes them, before rotary positions."""
    bias = torch.cat((rule.q_bias, torch.zeros_like(rule.q_bias), rule.v_bias))
    heads = (qkv_lD + bias).unflatten(-1, (3, rule.num_heads, rule.head_width))
    q_Hlc, k_Hlc, v_Hlc = heads.permute(1, 2, 0, 3).contiguous()
    if rule.l2_norm:
        q_Hlc, k_Hlc = F.normalize(q_Hlc, dim=-1), F.normalize(k_Hlc, dim=-1)
    return q_Hlc * rule.q_factor.view(-1, 1, 1), k_Hlc, v_Hlc


def _grid_codes(x: Tensor, spec: TensorSpec, dims: int | tuple[int, ...]) -> Integers:
    row = QUANTIZERS[spec.type]
    grid = row.grid_of(x, spec, dims)
    return Integers(_integers(row.codes(x, grid, spec.num_bits), grid, spec), grid.scale)


def _integers(codes: Tensor, grid: Grid, spec: TensorSpec) -> Tensor:
    """What codes stand for in units of the scale, int64."""
    wide_grid = Grid(grid.scale.double(), grid.zero_point.double())
    found = QUANTIZERS[spec.type].integers(codes.double(), wide_grid, spec.num_bits)
    return found.to(torch.int64)


def _store(
    cache: Cache,
    row: int,
    k_Hlc: Tensor,
    v_Hlc: Tensor,
    rule: AttentionRule,
    spans: Sequence[Span],
) -> None:
    key, value = rule.spec.key, rule.spec.value
    assert key is not None and value is not None
    if key.strategy == "channel":
        cache.append(row, key=k_Hlc)
    else:
        keys = _grid_codes(k_Hlc, key, -1)
        cache.append(row, key=keys.u, key_scale=keys.scale)
    if rule.spec.policy == "release":
        cache.append(row, value=v_Hlc)
        return
    if rule.spec.policy == "token":
        grid = QUANTIZERS[value.type].grid_of(v_Hlc, value)
    else:
        grid = _segment_grid(v_Hlc, value, spans)
    values = _wide_integers(v_Hlc, grid, rule)
    cache.append(row, value=values.u, value_scale=values.scale)


def _segment_grid(v_Hlc: Tensor, spec: TensorSpec, spans: Sequence[Span]) -> Grid:
    """One range per head and scale, (H, l, 1)."""
    grids = []
    for span in spans:
        part = v_Hlc[:, span.queries]
        grid = affine_grid(part, spec.num_bits, (-2, -1), spec.range_rule)
        grids.append([t.expand(-1, part.shape[1], -1) for t in grid])
    return Grid(*(torch.cat(tensors, dim=1) for tensors in zip(*grids, strict=True)))


def _wide_integers(v_Hlc: Tensor, grid: Grid, rule: AttentionRule) -> Integers:
    """u of the values, under shift-and-sum at the finest order: 2^m (code - zero point)."""
    assert rule.spec.value is not None
    value = rule.spec.value
    row, bits = QUANTIZERS[value.type], value.num_bits
    if rule.theta is None or not row.even_steps:
        return Integers(_integers(row.codes(v_Hlc, grid, bits), grid, value), grid.scale)
    finest = torch.full_like(v_Hlc[..., 0], rule.spec.max_order, dtype=torch.int64)
    codes, factor = shift_sum_codes(v_Hlc, grid, finest, bits), 2**rule.spec.max_order
    u = (codes.double() - grid.zero_point.double()) * factor
    return Integers(u.to(torch.int64), grid.scale)


def _probabilities(
    q_Hlc: Tensor, cache: Cache, row: int, num_keys: int, rule: AttentionRule
) -> Tensor:
    """Softmax of the scores (H, l, L) in float32."""
    query, key = rule.spec.query, rule.spec.key
    assert query is not None and key is not None
    q, keys = _grid_codes(q_Hlc, query, -1), cache.first(row, "key", num_keys)
    if key.strategy == "channel":
        k = _grid_codes(keys, key, -2)
        weighted = q.u.double() * k.scale.double()
        scores = (weighted @ k.u.double().transpose(-1, -2) * q.scale).float()
    else:
        k_scale_HL1 = cache.first(row, "key_scale", num_keys)
        scores = _product(q.u, keys.transpose(-1, -2)).float() * (
            q.scale * k_scale_HL1.transpose(-1, -2)
        )
    return scores.softmax(dim=-1)


def _mix(p_HlL: Tensor, cache: Cache, row: int, rule: AttentionRule, span: Span) -> Tensor:
    """The attention-value product (H, l, c), float32."""
    spec, num_keys = rule.spec, span.keys
    assert spec.value is not None
    order_HL = (
        torch.zeros_like(p_HlL[:, 0], dtype=torch.int64)
        if rule.theta is None
        else orders(token_scores(p_HlL), rule.theta, spec.max_order)
    )
    copies_HL1 = copies_of(order_HL, torch.float32)
    if spec.policy == "release":
        v_HLc = cache.first(row, "value", num_keys)
        grid = affine_grid(v_HLc, spec.value.num_bits, (-2, -1), spec.value.range_rule)
        codes = shift_sum_codes(v_HLc, grid, order_HL, spec.value.num_bits)
        u = ((codes.double() - grid.zero_point.double()) * copies_HL1).to(torch.int64)
        scale_HL1 = grid.scale.expand(-1, num_keys, -1)
    else:
        u = _at_order(cache.first(row, "value", num_keys), order_HL, rule)
        scale_HL1 = cache.first(row, "value_scale", num_keys)
    if spec.policy == "token":
        return _folded(p_HlL, u, scale_HL1 / copies_HL1, rule)
    # On the common grid of the finest order, so that keys of all orders add up as integers.
    u = u << (spec.max_order - order_HL).unsqueeze(-1)
    ends = span.ends if spec.policy == "segment" else (num_keys,)
    return _by_segment(p_HlL, u, scale_HL1 / 2**spec.max_order, rule, ends)


def _at_order(u: Tensor, order_HL: Tensor, rule: AttentionRule) -> Tensor:
    """Cached integers at the orders of a call: rounding shifts of the finest ones."""
    if rule.theta is None:
        return u
    shift = (rule.spec.max_order - order_HL).unsqueeze(-1)
    return (u + (1 << shift >> 1)) >> shift


def _folded(p_HlL: Tensor, u_HLc: Tensor, step_HL1: Tensor, rule: AttentionRule) -> Tensor:
    """Policy "token": the step of a value is folded into its probability."""
    # A step of 0 belongs to values of 0.
    largest = step_HL1.amax(dim=-2, keepdim=True).clamp(min=LEAST_SCALE)
    relative_H1L = (step_HL1 / largest).transpose(-1, -2)
    mixed, hat = _products(p_HlL * relative_H1L, [u_HLc], rule)
    out = mixed[0] * largest
    if not rule.spec.renormalize:
        return out
    return out / (hat / relative_H1L.clamp(min=LEAST_SCALE)).sum(dim=-1, keepdim=True)


def _by_segment(
    p_HlL: Tensor, u_HLc: Tensor, step_HL1: Tensor, rule: AttentionRule, ends: tuple[int, ...]
) -> Tensor:
    """A step per segment (policy "segment") or one for all values ("release")."""
    bounds = [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]
    parts = [torch.zeros_like(u_HLc) for _ in bounds]
    for part, bound in zip(parts, bounds, strict=True):
        part[:, bound] = u_HLc[:, bound]
    mixed, hat = _products(p_HlL, parts, rule)
    out = torch.zeros_like(mixed[0])
    for product, bound in zip(mixed, bounds, strict=True):
        out += product * step_HL1[:, bound.start : bound.start + 1]
    return out / hat.sum(dim=-1, keepdim=True) if rule.spec.renormalize else out


def _products(
    p_HlL: Tensor, values: list[Tensor], rule: AttentionRule
) -> tuple[list[Tensor], Tensor]:
    """Quantized probabilities times each tensor of integers (H, L, c), and the probabilities."""
    spec = rule.spec.probability
    assert spec is not None
    p_HlL = wide(p_HlL)
    if spec.type == "uniform":
        scale = uniform_scale(p_HlL, spec.num_bits)
        codes = uniform_codes(p_HlL, scale, spec.num_bits)
        integers = codes.to(torch.int64)
        return [_product(integers, u).float() * scale for u in values], codes * scale
    scale = row_max(p_HlL)
    codes = log2_codes(p_HlL, scale, spec.num_bits)
    powers = log2_values(codes.double(), torch.ones_like(scale, dtype=torch.float64), spec.num_bits)
    return [(powers @ u.double()).float() * scale for u in values], (powers * scale).float()
