"""Every Triton kernel against runtime `reference`, at the shapes of a model and the codes of a
preset.

    quantize     codes, scales, zero points of random rows: after a norm, GELU, means, rotation
    linear       equal codes times packed weights: integers, and floats after scales and bias
    append       codes that the cache keeps of keys and values
    attention    mixed values of the whole pyramid: statistics, orders of shift-and-sum, product

A row, an output and a head depend on no other, so the reference computes all rows, some outputs and
some heads. What comes before a quantizer is float arithmetic in another order: there a code on a
border may be the next one, and the share of such codes is what is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.runtime_variants import simulated
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.seams import spans_of
from varptq.quant.find import set_theta
from varptq.runtime import reference
from varptq.runtime.attention import IntAttention
from varptq.runtime.convert import on_integers
from varptq.runtime.cuda import gemm
from varptq.runtime.cuda.kernels import CudaKernels, Rows
from varptq.runtime.kernels import CODEBOOK_ZERO, AttentionRule, InputRule, Pending
from varptq.runtime.layers import DeferredNorm, IntLinear
from varptq.runtime.reference import ReferenceKernels

# Codes of 8 and fewer bits, codebooks, groups, signs apart, both policies of values.
PRESETS = ("w8a8", "w6a6", "w4a8", "w4a4", "w2a8", "w4a4+groups+segment", "w4a4+paper+p8+token")
# Threshold of shift-and-sum where a preset has it on: orders of all sizes at these shapes.
THETA = {"w4a4+groups+segment": 0.005, "w4a4+paper+p8+token": 0.005}
OUTPUTS, HEADS, IMAGES = 64, 4, 2
Found = dict[str, Any]


def check(one: Pipeline, preset: str, device: str) -> Iterator[tuple[str, Found]]:
    """Name and findings of each kernel, with the layer whose shape it has and the rows."""
    quantized = simulated(one, preset)
    if preset in THETA:
        set_theta(quantized.var, THETA[preset])
    ours = on_integers(quantized, CudaKernels()).to(device=device)
    theirs = dict(on_integers(quantized, ReferenceKernels()).var.named_modules())
    fed = {name for name, source in ours.var.feeds().items() if _is_norm(ours, source)}
    lengths = ours.scales.lengths
    for name, layer in ours.var.named_modules():
        if isinstance(layer, IntLinear):
            # The smallest scale, one between and the largest.
            for length in dict.fromkeys((lengths[0], lengths[len(lengths) // 2], lengths[-1])):
                rows = f"{name}, {IMAGES * length} rows"
                pending = name in fed
                operand = theirs[name]
                assert isinstance(operand, IntLinear)
                yield from _linear(layer, operand, length, pending, rows, device)
        elif isinstance(layer, IntAttention):
            yield from _attention(layer.rule, ours.scales, name, device)


def _is_norm(pipe: Pipeline, source: str) -> bool:
    return isinstance(pipe.var.get_submodule(source), DeferredNorm)


def _linear(
    ours: IntLinear, theirs: IntLinear, length: int, pending: bool, rows: str, device: str
) -> Iterator[tuple[str, Found]]:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rule, width = ours.rule, ours.in_features
    x: Tensor | Pending = random(IMAGES, length, width)
    if pending:
        x = Pending(x, 0.1 * random(IMAGES, 1, width), 0.1 * random(IMAGES, 1, width))
    # Tables of three scales, of which this is the second.
    means, bias = 0.1 * random(3, width), random(3, ours.out_features)
    table_row = torch.ones(1, dtype=torch.int32)
    expected = ReferenceKernels().quantize(x, rule, means, table_row)
    there = Pending(*(t.to(device) for t in x)) if isinstance(x, Pending) else x.to(device)
    found = CudaKernels().quantize(there, rule, means.to(device), table_row)
    codes = as_reference(found, rule)
    yield f"quantize {rows}", _codes(codes, expected)

    chosen = torch.arange(0, ours.out_features, max(1, ours.out_features // OUTPUTS))
    packed: Any = theirs.packed._replace(**{n: t[chosen] for n, t in _fields(theirs.packed)})
    product = torch.stack(ReferenceKernels().products(codes, packed), dim=-1)
    exact = gemm.linear(found.codes, ours.packed, exact=True)[:, chosen.to(device)].cpu()
    exact = exact.unflatten(0, (-1, len(codes.codes))).transpose(0, 1)
    y = CudaKernels().linear(found, ours.packed, bias.to(device), table_row).cpu()[..., chosen]
    shape = torch.Size((IMAGES, length, width))
    rounded = ReferenceKernels().linear(
        codes._replace(shape=shape), packed, bias[:, chosen], table_row
    )
    yield (
        f"linear {rows}",
        {"equal": torch.equal(exact.long(), product.long()), "largest": _relative(y, rounded)},
    )


def _fields(packed: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, t) for name, t in packed._asdict().items() if isinstance(t, Tensor))


def as_reference(found: Rows, rule: InputRule) -> reference.Rows:
    """Rows of the Triton kernels as the reference has them, on the CPU."""
    codes, scale, zero_point = (t.cpu() for t in found.codes[:3])
    # Stored less 128: all of a codebook, and uniform steps of 8 bits.
    shifted = rule.codebook or (rule.num_bits == 8 and not rule.sign_split)
    offset = CODEBOOK_ZERO if shifted else 0
    signs = 2 if rule.sign_split else 1
    codes, scale, zero_point = (
        t.unflatten(0, (-1, signs)).transpose(0, 1)
        for t in (codes.int() + offset, scale, zero_point.long() + offset)
    )
    shape = torch.Size((*found.shape, rule.inputs))
    return reference.Rows(codes.to(torch.uint8), scale, zero_point, shape, rule.layer)


def _codes(found: reference.Rows, expected: reference.Rows) -> Found:
    difference = (found.codes.int() - expected.codes.int()).abs()
    return {
        "equal": torch.equal(found.codes, expected.codes)
        and torch.equal(found.zero_point, expected.zero_point),
        "differ": float((difference > 0).double().mean()),
        "largest": _relative(found.scale, expected.scale),
    }


def _attention(
    rule: AttentionRule, scales: Scales, name: str, device: str
) -> Iterator[tuple[str, Found]]:
    """All scales one after another, as generation does, for a few heads."""
    heads, head = min(HEADS, rule.num_heads), rule.head_width
    generator = torch.Generator().manual_seed(0)
    q_bias, v_bias = 0.1 * torch.randn(2, heads * head, generator=generator)
    few = dataclasses.replace(
        rule, num_heads=heads, q_bias=q_bias, v_bias=v_bias, q_factor=rule.q_factor[:heads].cpu()
    )
    tensors = {key: getattr(few, key).to(device) for key in ("q_bias", "v_bias", "q_factor")}
    there = dataclasses.replace(few, **tensors)
    ours, theirs = CudaKernels(), ReferenceKernels()
    cache = ours.new_cache(there, IMAGES, scales.ends)
    expected_cache = theirs.new_cache(few, IMAGES, scales.ends)
    qkv = torch.randn(IMAGES, scales.num_tokens, 3 * heads * head, generator=generator)
    largest, outputs = 0.0, 0
    for scale, part in enumerate(scales.slices()):
        spans = spans_of(scales, scale, scale + 1)
        found = ours.attend(qkv[:, part].to(device), there, cache, spans).cpu()
        expected = theirs.attend(qkv[:, part], few, expected_cache, spans)
        largest, outputs = max(largest, _relative(found, expected)), outputs + found.numel()
    tokens = f"{name}, {scales.num_tokens} tokens, {heads} heads"
    kept = {"key": (cache.k.int() - cache.k_zero.unsqueeze(-1), cache.k_scale)}
    kept["value"] = (cache.v.int() + cache.v_extra.unsqueeze(-1), cache.v_scale)
    for operand, (u, scale) in kept.items():
        yield f"append {operand}s {tokens}", _kept(operand, u, scale, expected_cache)
    yield f"attention {tokens}", {"largest": largest}


def _kept(operand: str, u: Tensor, scale: Tensor, cache: Any) -> Found:
    """Cached integers (B H, L, c) and scales (B H, L) against those of the reference."""
    rows, length = range(len(cache.rows)), cache.length
    integers = torch.cat([cache.first(row, operand, length) for row in rows])
    steps = torch.cat([cache.first(row, f"{operand}_scale", length) for row in rows]).squeeze(-1)
    differs = u.cpu().long() != integers
    return {
        "equal": not bool(differs.any()),
        "differ": float(differs.double().mean()),
        "largest": _relative(scale.cpu(), steps),
    }


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
