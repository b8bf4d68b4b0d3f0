"""Runtime "reference": plain torch integers. Slow, exact, on any machine; the others are tested
against it.

    y[m, n] = sum over groups of sa[m, g] sw[n, g] P'[m, n, g],   P' = sum of (a - za)(w - zw)

P' is an integer product in int32 or int64, whichever holds it; the sums over groups are float32 in
ascending order. Codes come from the functions of `varptq.quant` themselves. Where torch's result
for one row depends on the other rows or on threads, rows are computed in pieces. The attention
products are in reference_attention.py, convolutions in reference_convolution.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.errors import InputError, NonFiniteError
from varptq.models.convolutions import Taps
from varptq.models.rotary import Rotary
from varptq.models.sampling import PerImageSampler, Sampler
from varptq.models.seams import LAYER_NORM_EPS, Span
from varptq.quant.affine import affine_codes, affine_grid, to_groups
from varptq.quant.convolution import MapCodes, map_codes
from varptq.quant.quantizers import QUANTIZERS
from varptq.quant.sign_split import sign_split_codes, sign_split_grid
from varptq.quant.transforms import hadamard
from varptq.runtime import reference_attention as attention
from varptq.runtime.kernels import (
    CODEBOOK_ZERO,
    AttentionRule,
    InputRule,
    Map,
    NormRule,
    Pending,
    Weight,
)
from varptq.runtime.layers import by_rows
from varptq.runtime.reference_convolution import (
    OrderedPhi,
    affine,
    norm_codes,
    products,
    scaled,
)

INT32_END = 2**31


class Rows(NamedTuple):
    """Quantized rows, T = 2 signs of a sign-split input (positive, then negative codes with a
    negative scale), else 1.

    codes (T, M, K) uint8, scale (T, M, G) float32, zero_point (T, M, G) int64; `shape` is the
    input's.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    shape: torch.Size
    layer: str

    def centred(self) -> Tensor:
        """(T, M, K) int64: codes less their zero points."""
        groups = self.codes.to(torch.int64).unflatten(-1, (self.scale.shape[-1], -1))
        return (groups - self.zero_point.unsqueeze(-1)).flatten(-2)


class PackedWeight(NamedTuple):
    """codes (N, K) uint8, scale (N, G) float32, zero_point (N, G) int64."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def centred(self) -> Tensor:
        """(N, K) int64."""
        groups = self.codes.to(torch.int64).unflatten(-1, (self.scale.shape[-1], -1))
        return (groups - self.zero_point.unsqueeze(-1)).flatten(-2)


class PackedConvolution(NamedTuple):
    """codes (O, I, k, k) int8, scale (O,) float32."""

    codes: Tensor
    scale: Tensor


class Scaled(Protocol):
    """Any packed weight that has a scale (N, G)."""

    @property
    def scale(self) -> Tensor: ...


class ReferenceKernels:
    """Executes every config in which both operands of each product are integers."""

    name = "reference"

    def refuse_linear(self, rule: InputRule) -> str | None:
        return None

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        return attention.refuse(rule)

    def pack(self, weight: Weight, rule: InputRule) -> Any:
        weight = weight.in_bytes()
        return PackedWeight(weight.codes, weight.scale, weight.zero_point.to(torch.int64))

    def quantize(
        self, x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
    ) -> Rows:
        values = prepared(x, rule, means, rows)
        if not bool(values.isfinite().all()):
            raise NonFiniteError(f"layer {rule.layer}: input holds NaN or infinity")
        groups = to_groups(values.flatten(0, -2), rule.group or values.shape[-1])
        if rule.codebook:
            row, bits = QUANTIZERS[rule.type], rule.num_bits
            fitted = row.grid(groups, bits)
            entries = row.integers(row.codes(groups, fitted, bits), fitted, bits)
            codes, scale = (entries + CODEBOOK_ZERO).unsqueeze(0), fitted.scale.unsqueeze(0)
            zero_point = torch.full_like(scale, CODEBOOK_ZERO)
        elif rule.sign_split:
            grid = sign_split_grid(groups, rule.num_bits)
            signed = sign_split_codes(groups, grid, rule.num_bits)
            codes = torch.stack((signed.clamp(min=0), -signed.clamp(max=0)))
            scale = torch.stack((grid.positive, -grid.negative))
            zero_point = torch.zeros_like(scale)
        else:
            affine = affine_grid(groups, rule.num_bits, -1, rule.range_rule)
            codes = affine_codes(groups, affine, rule.num_bits).unsqueeze(0)
            scale, zero_point = affine.scale.unsqueeze(0), affine.zero_point.unsqueeze(0)
        return Rows(
            codes.flatten(-2).to(torch.uint8),
            scale.squeeze(-1),
            exact_integers(zero_point.squeeze(-1), rule.layer),
            values.shape,
            rule.layer,
        )

    def products(self, codes: Rows, packed: Any) -> list[Tensor]:
        """P' (T, M, N) of each segment, in ascending order."""
        rows, weight = codes.centred(), packed.centred()
        width = segment(codes, packed)
        largest = int(rows.abs().max()) * int(weight.abs().max()) * width
        if largest >= INT32_END**2:
            raise InputError(f"layer {codes.layer}: integers beyond 64 bits; use runtime simulated")
        dtype = torch.int32 if largest < INT32_END else torch.int64
        parts = zip(
            rows.to(dtype).split(width, dim=-1), weight.to(dtype).split(width, dim=-1), strict=True
        )
        return [a_TMg @ w_Ng.T for a_TMg, w_Ng in parts]

    def linear(self, codes: Rows, packed: Any, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        y = combined(codes, packed, self.products(codes, packed))
        y = y.view(*codes.shape[:-1], -1)
        return y if bias is None else y + chosen(bias, rows)

    def new_cache(self, rule: AttentionRule, rows: int, ends: tuple[int, ...]) -> attention.Cache:
        return attention.Cache(rows)

    def attend(
        self,
        qkv_BlD: Tensor,
        rule: AttentionRule,
        cache: attention.Cache,
        spans: Sequence[Span],
        tables: Rotary | None = None,
    ) -> Tensor:
        return attention.attend(qkv_BlD, rule, cache, spans, tables)

    def read(self, kv_RTD: Tensor, rule: AttentionRule) -> attention.Cache:
        return attention.read(kv_RTD, rule)

    def answer(
        self, q_RlC: Tensor, rule: AttentionRule, cache: attention.Cache, spans: Sequence[Span]
    ) -> Tensor:
        return attention.answer(q_RlC, rule, cache, spans)

    def phi(self, phi: nn.Conv2d) -> nn.Module:
        return OrderedPhi(phi)

    def sampler(self) -> Sampler:
        return PerImageSampler()

    def takes_convolution(self, weight_OIkk: Tensor, taps: Taps) -> bool:
        return True

    def pack_convolution(self, weight_OIkk: Tensor, scale_O: Tensor, taps: Taps) -> Any:
        return PackedConvolution(weight_OIkk, scale_O)

    def map_codes(self, x: Map, norm: NormRule | None, layer: str) -> MapCodes:
        return norm_codes(x.x_NHWC, norm, layer) if norm else map_codes(x.x_NHWC, layer)

    def affine(self, x: Map, norm: NormRule) -> tuple[Tensor, Tensor]:
        return affine(x.x_NHWC, norm)

    def convolution(
        self, codes: MapCodes, packed: Any, bias_O: Tensor | None, taps: Taps, skip: Tensor | None
    ) -> Map:
        found = products(codes.codes, codes.zero_point, packed.codes, taps)
        y_NHWO = scaled(found, codes.scale, packed.scale, bias_O)
        return Map(y_NHWO if skip is None else y_NHWO + skip)


def prepared(
    x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
) -> Tensor:
    """The float32 values to quantize: after norm or GELU, less their means, rotated."""
    if isinstance(x, Pending):
        normed = F.layer_norm(x.x_BLC, x.x_BLC.shape[-1:], eps=LAYER_NORM_EPS)
        x = normed * (1 + x.scale_B1C) + x.shift_B1C
    x = x.float()
    if rule.gelu:
        x = by_rows(lambda part: F.gelu(part, approximate="tanh"), x)
    if means is not None:
        x = x - chosen(means, rows)
    return hadamard(x, rule.block) if rule.block else x


def chosen(table: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a table (R, K) that the tokens take; the first one if `rows` is None."""
    return table[0] if rows is None else table[rows.long()]


def exact_integers(zero_point: Tensor, layer: str) -> Tensor:
    """Zero points as int64. Raises `InputError` for one beyond 32 bits, which happens only if a
    range excludes zero (almost constant values far from it)."""
    if float(zero_point.abs().max()) >= INT32_END:
        raise InputError(f"layer {layer}: a zero point beyond 32 bits; use runtime simulated")
    return zero_point.to(torch.int64)


def segment(codes: Rows, packed: Scaled) -> int:
    """Number of channels that share one scale on both sides."""
    width = codes.codes.shape[-1]
    return math.gcd(width // codes.scale.shape[-1], width // packed.scale.shape[-1])


def combined(codes: Rows, packed: Scaled, products: Sequence[Tensor]) -> Tensor:
    """float32 (M, N) from the integer products of the segments, signs added."""
    width, count = segment(codes, packed), codes.codes.shape[-1]
    row_group, weight_group = (count // t.scale.shape[-1] for t in (codes, packed))
    scale_TMG, scale_NG = codes.scale, packed.scale
    if row_group == weight_group == count:
        scale_TMN = scale_TMG * scale_NG.T
        return (products[0].float() * scale_TMN).sum(dim=0)
    y = torch.zeros_like(products[0], dtype=torch.float32)
    per_row = row_group == count
    for g, first in enumerate(range(0, count, weight_group)):
        inner = torch.zeros_like(y)
        for start in range(first, first + weight_group, width):
            product = products[start // width].float()
            inner += product if per_row else product * scale_TMG[..., start // row_group, None]
        y += inner * scale_NG[:, g]
    return (y * scale_TMG if per_row else y).sum(dim=0)
