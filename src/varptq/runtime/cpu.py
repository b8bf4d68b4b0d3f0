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
from varptq.models.seams import Span
from varptq.native import attention, binding, convolution, linear, quantize, sampler
from varptq.native.phi import add_phi
from varptq.native.room import Room
from varptq.runtime import compiled
from varptq.runtime.cpu_scheme import quantized, scheme
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
from varptq.runtime.reference_convolution import affine, affine_of


def cpu_kernels() -> Kernels:
    """The native core if it is available, else torch's integer products, with a warning. Another
    one for a cap that is no instruction set."""
    if binding.core() is not None:
        if mistake := binding.unknown_cap():
            warnings.warn(mistake, stacklevel=2)
        return NativeKernels()
    warnings.warn(f"runtime 'cpu' takes its slow path: {binding.reason()}", stacklevel=2)
    return TorchKernels()


class NativeCache(NamedTuple):
    scheme: attention.AttentionScheme
    codes: attention.AttentionCache

    @classmethod
    def of(cls, rule: AttentionRule, rows: int, ends: tuple[int, ...]) -> NativeCache:
        layout = scheme(rule, ends)
        return cls(layout, attention.AttentionCache(layout, rows))

    def first_rows(self, rows: int) -> NativeCache:
        return NativeCache(self.scheme, self.codes.first_rows(rows))


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
        take = compiled.quantize if torch.compiler.is_compiling() else quantized
        return take(x, rule, means, rows)

    def linear(
        self,
        codes: quantize.Rows,
        packed: linear.PackedWeight,
        bias: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return compiled.linear(codes, packed, bias, rows)
        return linear.linear(codes, packed, bias, rows, room=self._room)

    def new_cache(
        self, rule: AttentionRule, rows: int, ends: tuple[int, ...]
    ) -> NativeCache | None:
        """None in a graph of torch.compile, where `attend` makes its own."""
        return None if torch.compiler.is_compiling() else NativeCache.of(rule, rows, ends)

    def attend(
        self,
        qkv_BlD: Tensor,
        rule: AttentionRule,
        cache: NativeCache | None,
        spans: Sequence[Span],
        tables: Rotary | None = None,
    ) -> Tensor:
        if cache is None:
            return compiled.attend(qkv_BlD, rule, spans, tables)
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

    def read(self, kv_RTD: Tensor, rule: AttentionRule) -> NativeCache | Tensor:
        """As they come in a graph of torch.compile, where `answer` makes codes of them."""
        if torch.compiler.is_compiling():
            return kv_RTD
        rows, length, _ = kv_RTD.shape
        cache = NativeCache.of(rule, rows, (length,))
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
        self,
        q_RlC: Tensor,
        rule: AttentionRule,
        cache: NativeCache | Tensor,
        spans: Sequence[Span],
    ) -> Tensor:
        if isinstance(cache, Tensor):
            return compiled.answer(q_RlC, cache, rule, spans)
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

    def affine(self, x: Map, norm: NormRule) -> tuple[Tensor, Tensor]:
        made_here = x.found is not None
        return affine_of(x.found.sums, x.x_NHWC, norm) if made_here else affine(x.x_NHWC, norm)

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
            in_place=True,
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
        noise = [random.uniform(length, vocabulary) for random in randoms]
        # Of one image without a copy, which is as large as its logits.
        noise_BlV = torch.stack(noise) if len(noise) > 1 else noise[0].unsqueeze(0)
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
