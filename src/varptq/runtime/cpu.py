"""Runtime "cpu": the native core, or torch's own integer products where the core is missing.

Both execute the same configurations, those that limits.py lets through, and compute the definitions
of runtime "reference". What torch does without the core is in cpu_torch.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varptq.models.convolutions import Taps
from varptq.models.rotary import Rotary
from varptq.models.sampling import DrawPlan, ImageRandom, PerImageSampler, Sampler
from varptq.models.seams import LAYER_NORM_EPS, Span
from varptq.native import attention, binding, convolution, linear, quantize, sampler
from varptq.native.phi import add_phi
from varptq.native.room import Room
from varptq.quant.codebook import HALVES, reach
from varptq.quant.quantizers import QUANTIZERS
from varptq.runtime.cpu_torch import TorchKernels
from varptq.runtime.kernels import (
    AttentionRule,
    InputRule,
    Kernels,
    Map,
    NormRule,
    Pending,
    Weight,
)
from varptq.runtime.limits import refuse_attention, refuse_linear


def cpu_kernels() -> Kernels:
    """The native core if it is available, else torch's integer products, with a warning."""
    if binding.core() is not None:
        return NativeKernels()
    warnings.warn(f"runtime 'cpu' takes its slow path: {binding.reason()}", stacklevel=2)
    return TorchKernels()


def scheme(rule: AttentionRule, ends: tuple[int, ...] = ()) -> attention.AttentionScheme:
    """The attention of one layer in the words of the native core; a cache needs `ends`."""
    spec = rule.spec
    assert spec.query and spec.key and spec.value and spec.probability
    assert spec.policy != "release"
    return attention.AttentionScheme(
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


def book(type_: str, num_bits: int) -> quantize.Codebook | None:
    """The codebook of a type in the words of the native core."""
    if QUANTIZERS[type_].table is None:
        return None
    return quantize.Codebook(HALVES[num_bits], reach(num_bits))


class NativeCache(NamedTuple):
    scheme: attention.AttentionScheme
    codes: attention.AttentionCache


class NativeKernels:
    """The native core: fused kernels, results independent of batch, threads and instruction set."""

    name = "cpu"

    def __init__(self) -> None:
        # Kept from image to image: fresh memory costs a seventh of decoding one.
        self._room = Room()

    def refuse_linear(self, rule: InputRule) -> str | None:
        return refuse_linear(rule)

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        return refuse_attention(rule)

    def pack(self, weight: Weight, rule: InputRule) -> linear.PackedWeight:
        if weight.num_bits > linear.TABLE_BITS:
            weight = weight.in_bytes()
        return linear.pack(
            weight.codes,
            weight.scale,
            weight.zero_point,
            num_bits=weight.num_bits,
            row_group=rule.group,
            table=weight.table,
        )

    def quantize(
        self, x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
    ) -> quantize.Rows:
        norm = None
        if isinstance(x, Pending):
            x, norm = x.x_BLC, quantize.Norm(x.scale_B1C, x.shift_B1C, LAYER_NORM_EPS)
        return quantize.quantize(
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

    def linear(
        self,
        codes: quantize.Rows,
        packed: linear.PackedWeight,
        bias: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        return linear.linear(codes, packed, bias, rows)

    def new_cache(self, rule: AttentionRule, rows: int, ends: tuple[int, ...]) -> NativeCache:
        layout = scheme(rule, ends)
        return NativeCache(layout, attention.AttentionCache(layout, rows))

    def attend(
        self,
        qkv_BlD: Tensor,
        rule: AttentionRule,
        cache: NativeCache,
        spans: Sequence[Span],
        tables: Rotary | None = None,
    ) -> Tensor:
        return attention.attend(
            cache.scheme,
            qkv_BlD,
            cache.codes,
            spans,
            query_bias_C=rule.q_bias,
            value_bias_C=rule.v_bias,
            query_factor_H=rule.q_factor,
            tables=tables,
            theta=rule.theta,
            layer=rule.layer,
        )

    def read(self, kv_RTD: Tensor, rule: AttentionRule) -> NativeCache:
        rows, length, _ = kv_RTD.shape
        cache = self.new_cache(rule, rows, (length,))
        attention.enter(
            cache.scheme,
            kv_RTD,
            cache.codes,
            value_bias_C=rule.v_bias,
            theta=rule.theta,
            layer=rule.layer,
        )
        return cache

    def answer(
        self, q_RlC: Tensor, rule: AttentionRule, cache: NativeCache, spans: Sequence[Span]
    ) -> Tensor:
        return attention.answer(
            cache.scheme,
            q_RlC,
            cache.codes,
            spans,
            query_factor_H=rule.q_factor,
            theta=rule.theta,
            layer=rule.layer,
        )

    def phi(self, phi: nn.Conv2d) -> nn.Module:
        return NativePhi(phi)

    def sampler(self) -> Sampler:
        return NativeSampler()

    def takes_convolution(self, weight_OIkk: Tensor, taps: Taps) -> bool:
        return convolution.fits(tuple(weight_OIkk.shape), taps.stride, taps.pads)

    def pack_convolution(
        self, weight_OIkk: Tensor, scale_O: Tensor, taps: Taps
    ) -> convolution.PackedKernel:
        return convolution.pack(weight_OIkk, scale_O)

    def map_codes(self, x: Map, norm: NormRule | None, layer: str) -> convolution.Codes:
        rule, silu = None, norm is not None and norm.silu
        if norm is not None:
            rule = convolution.Norm(norm.groups, norm.weight_C, norm.bias_C, norm.eps)
        return convolution.map_codes(
            x.x_NHWC, rule, silu=silu, moments=x.found, room=self._room, layer=layer
        )

    def convolution(
        self,
        codes: convolution.Codes,
        packed: convolution.PackedKernel,
        bias_O: Tensor | None,
        taps: Taps,
        skip: Tensor | None,
    ) -> Map:
        moments = convolution.new_moments(codes.shape[0], packed.shape[0])
        y_NHWO = convolution.convolution(
            codes,
            packed,
            bias_O,
            stride=taps.stride,
            padding=taps.pads,
            upsample=taps.upsample,
            residual=skip,
            moments=moments,
            room=self._room,
        )
        return Map(y_NHWO, moments)


class NativePhi(nn.Module):
    """phi(h) of the token map on the native core."""

    def __init__(self, phi: nn.Conv2d) -> None:
        super().__init__()
        assert phi.bias is not None
        self.weight, self.bias = phi.weight, phi.bias

    def forward(self, h_BCPP: Tensor) -> Tensor:
        return add_phi(torch.zeros_like(h_BCPP), h_BCPP, self.weight, self.bias)


class NativeSampler(PerImageSampler):
    """Guidance, filters and the draw in one pass of the native core."""

    def draw(
        self,
        logits_BlV: Tensor,
        guidance: float | None,
        settings: DrawPlan,
        randoms: Sequence[ImageRandom],
        *,
        filtered: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        length, vocabulary = logits_BlV.shape[1:]
        noise_BlV = torch.stack([random.uniform(length, vocabulary) for random in randoms])
        drawn = sampler.sample(
            logits_BlV,
            guidance=guidance,
            top_k=settings.top_k,
            top_p=settings.top_p,
            temperature=settings.temperature,
            uniform_BlV=noise_BlV,
            filtered=filtered,
        )
        assert drawn.ids is not None
        return drawn.ids, drawn.filtered
