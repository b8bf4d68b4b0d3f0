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

from varptq.models.sampling import ImageRandom, PerImageSampler, Sampler, SamplingSettings
from varptq.models.seams import LAYER_NORM_EPS, Span
from varptq.native import attention, binding, linear, quantize, sampler
from varptq.native.phi import add_phi
from varptq.runtime.cpu_torch import TorchKernels
from varptq.runtime.kernels import AttentionRule, InputRule, Kernels, Pending, Weight
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
    )


class NativeCache(NamedTuple):
    scheme: attention.AttentionScheme
    codes: attention.AttentionCache


class NativeKernels:
    """The native core: fused kernels, results independent of batch, threads and instruction set."""

    name = "cpu"

    def refuse_linear(self, rule: InputRule) -> str | None:
        return refuse_linear(rule)

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        return refuse_attention(rule)

    def pack(self, weight: Weight, rule: InputRule) -> linear.PackedWeight:
        return linear.pack(
            weight.codes,
            weight.scale,
            weight.zero_point,
            num_bits=weight.num_bits,
            row_group=rule.group,
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
        self, qkv_BlD: Tensor, rule: AttentionRule, cache: NativeCache, spans: Sequence[Span]
    ) -> Tensor:
        return attention.attend(
            cache.scheme,
            qkv_BlD,
            cache.codes,
            spans,
            query_bias_C=rule.q_bias,
            value_bias_C=rule.v_bias,
            query_factor_H=rule.q_factor,
            theta=rule.theta,
            layer=rule.layer,
        )

    def phi(self, phi: nn.Conv2d) -> nn.Module:
        return NativePhi(phi)

    def sampler(self) -> Sampler:
        return NativeSampler()


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
        settings: SamplingSettings,
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
