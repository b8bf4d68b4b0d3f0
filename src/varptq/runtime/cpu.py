"""Runtime "cpu": the native core, or torch's own integer products where the core is missing.

Both execute the same configurations, those whose codes and zero points fit the kernels, refuse the
others by name, and compute the definitions of runtime "reference". What torch does without the core
is in cpu_torch.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varptq.models.sampling import ImageRandom, PerImageSampler, Sampler, SamplingSettings
from varptq.models.seams import LAYER_NORM_EPS, Span
from varptq.native import binding, binding_attention
from varptq.runtime.kernels import AttentionRule, InputRule, Kernels, Pending, Weight

# The sum of more products of two 8-bit codes might overflow int32.
MAX_SEGMENT = 2**14


def cpu_kernels() -> Kernels:
    """The native core if it is available, else torch's integer products, with a warning."""
    if binding.core() is not None:
        return NativeKernels()
    from varptq.runtime.cpu_torch import TorchKernels

    warnings.warn(f"runtime 'cpu' takes its slow path: {binding.reason()}", stacklevel=2)
    return TorchKernels()


def refuse_linear(rule: InputRule) -> str | None:
    """What the kernels of this runtime lack for a Linear; None if nothing."""
    if rule.range_rule != "with_zero" and not rule.sign_split:
        return f"input range rule {rule.range_rule!r}, whose zero points need not be codes"
    if not rule.weight_zero_is_code:
        return "weight range rule 'min_max', whose zero points need not be codes"
    group, other = rule.group, rule.weight_group
    if group and other and max(group, other) % min(group, other):
        return f"input groups of {group} and weight groups of {other}, which do not nest"
    if min(group or rule.inputs, other or rule.inputs) > MAX_SEGMENT:
        return f"{rule.inputs} inputs that share a scale, at most {MAX_SEGMENT}"
    return None


def refuse_attention(rule: AttentionRule) -> str | None:
    """What the kernels of this runtime lack for an attention; None if nothing."""
    spec = rule.spec
    if spec.policy == "release":
        return "attention policy 'release', whose codes change when the cache grows"
    for name in ("query", "key", "probability", "value"):
        operand = getattr(spec, name)
        if operand is None:
            return f"{name} in float"
        if operand.range_rule != "with_zero" and name != "probability":
            return f"{name} range rule {operand.range_rule!r}, whose zero points need not be codes"
    assert spec.key is not None and spec.probability is not None
    if spec.key.strategy == "channel":
        return "key strategy 'channel', a scale along the axis that is summed"
    if spec.probability.type != "uniform":
        return f"probability type {spec.probability.type!r}, expected 'uniform'"
    if spec.renormalize:
        return "renormalized probabilities"
    return scheme(rule).lacks(rule.theta)


def scheme(rule: AttentionRule, ends: tuple[int, ...] = ()) -> binding_attention.AttentionScheme:
    """The attention of one layer as the native core describes it; a cache needs `ends`."""
    spec = rule.spec
    assert spec.query and spec.key and spec.value and spec.probability
    assert spec.policy != "release"
    return binding_attention.AttentionScheme(
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
    scheme: binding_attention.AttentionScheme
    codes: binding_attention.AttentionCache


class NativeKernels:
    """The native core: fused kernels, results independent of batch, threads and instruction set."""

    name = "cpu"

    def refuse_linear(self, rule: InputRule) -> str | None:
        return refuse_linear(rule)

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        return refuse_attention(rule)

    def pack(self, weight: Weight, rule: InputRule) -> binding.PackedWeight:
        return binding.pack(
            weight.codes,
            weight.scale,
            weight.zero_point,
            num_bits=weight.num_bits,
            row_group=rule.group,
        )

    def quantize(
        self, x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
    ) -> binding.Rows:
        norm = None
        if isinstance(x, Pending):
            x, norm = x.x_BLC, binding.Norm(x.scale_B1C, x.shift_B1C, LAYER_NORM_EPS)
        return binding.quantize(
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
        codes: binding.Rows,
        packed: binding.PackedWeight,
        bias: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        return binding.linear(codes, packed, bias, rows)

    def new_cache(self, rule: AttentionRule, rows: int, ends: tuple[int, ...]) -> NativeCache:
        layout = scheme(rule, ends)
        return NativeCache(layout, binding_attention.AttentionCache(layout, rows))

    def attend(
        self, qkv_BlD: Tensor, rule: AttentionRule, cache: NativeCache, spans: Sequence[Span]
    ) -> Tensor:
        return binding_attention.attend(
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
        return binding_attention.add_phi(torch.zeros_like(h_BCPP), h_BCPP, self.weight, self.bias)


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
        drawn = binding_attention.sample(
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
