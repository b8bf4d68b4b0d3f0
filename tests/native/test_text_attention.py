"""Cross-attention in the native core: a text enters once and is asked scale by scale. Every integer
against int64 arithmetic of torch, codes against the quantizers, the whole against the simulated
modules, and the bits against batch, threads, steps and instruction sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.models.seams import Span
from varptq.native import attention, binding
from varptq.quant.affine import affine_codes, affine_grid
from varptq.quant.attention import QuantMix, QuantScores, segment_grid
from varptq.quant.config import AttentionSpec, TensorSpec
from varptq.quant.shift_sum import fixed_codes

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason() or "built"),
]

# Queries of two scales.
CUTS = (slice(0, 4), slice(4, 13))
QUERIES = CUTS[-1].stop
CASES = [
    {},
    {"length": 1, "head_width": 64},
    {"length": 77, "head_width": 128, "bits": 4, "rows": 1},
    {"length": 16, "policy": "segment", "bits": 6},
    {"length": 33, "theta": 0.02, "bits": 4},
    {"length": 45, "theta": 0.02, "bits": 4, "policy": "segment", "head_width": 64},
    # Nothing bounds these scores: they reach hundreds.
    {"length": 20, "spread": 30.0},
]


class Case:
    """Queries of an image, the text they read, and the layer's scheme."""

    def __init__(
        self,
        length: int = 9,
        rows: int = 3,
        bits: int = 8,
        head_width: int = 20,
        policy: Any = "token",
        theta: float | None = None,
        spread: float = 3.0,
    ) -> None:
        heads, self.theta, self.bits = 3, theta, bits
        channels = heads * head_width
        self.scheme = attention.AttentionScheme(
            *(heads, head_width, (length,), policy, bits, bits, bits, 8),
            l2_norm=False,
            shift_sum=theta is not None,
        )
        g = torch.Generator().manual_seed(length)
        self.q = spread * torch.randn(rows, QUERIES, channels, generator=g)
        self.kv = spread * torch.randn(rows, length, 2 * channels, generator=g)
        self.bias = torch.randn(channels, generator=g)
        self.factor = torch.full((heads,), 1 / math.sqrt(head_width))
        self.spans = [Span(cut, (length,), k) for k, cut in enumerate(CUTS)]

    def cache(self, rows: slice = slice(None), trace: Any = None) -> attention.AttentionCache:
        cache = attention.AttentionCache(self.scheme, len(self.kv[rows]))
        options: dict[str, Any] = {"value_bias_C": self.bias, "theta": self.theta}
        kv = self.kv[rows]
        attention.enter(self.scheme, kv, cache, **options, trace=trace, layer="cross")
        return cache

    def ask(self, q: Tensor, cache: Any, spans: Any, trace: Any = None) -> Tensor:
        options: dict[str, Any] = {"query_factor_H": self.factor, "theta": self.theta}
        return attention.answer(self.scheme, q, cache, spans, **options, trace=trace, layer="cross")

    def whole(self, rows: slice = slice(None)) -> Tensor:
        return self.ask(self.q[rows], self.cache(rows), self.spans)

    def traced(self) -> tuple[Tensor, Any]:
        trace = attention.new_trace(self.scheme, len(self.q), QUERIES, len(self.spans))
        cache = self.cache(trace=trace)
        return self.ask(self.q, cache, self.spans, trace), trace

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, l or T, c) before quantization."""
        k, v = self.kv.chunk(2, dim=-1)
        shape = (self.scheme.heads, self.scheme.head_width)
        q, k, v = (t.unflatten(-1, shape).transpose(1, 2) for t in (self.q, k, v + self.bias))
        return q * self.factor[:, None, None], k, v

    def spec(self) -> AttentionSpec:
        own = TensorSpec(num_bits=self.bits)
        policy = self.scheme.policy
        return AttentionSpec(
            policy=policy,
            query=own,
            key=own,
            probability=TensorSpec(num_bits=8, type="uniform"),
            value=own.replace(strategy="token" if policy == "token" else "head"),
        )


@pytest.mark.parametrize("changes", CASES)
def test_every_integer_is_that_of_the_codes(changes: dict[str, Any], isa: str) -> None:
    case = Case(**changes)
    out, t = case.traced()
    q = t.query_codes.long() - t.query_zero[..., None]
    k = t.key_codes.long() - t.key_zero[..., None]
    scores = (q @ k.transpose(-1, -2)).float()
    scores = scores * (t.query_scale[..., None] * t.key_scale[..., None, :])
    assert torch.equal(t.scores, scores)
    u = t.value_codes.long() - t.value_zero[..., None]
    shared = case.scheme.policy == "segment"
    for index, span in enumerate(case.spans):
        at_order, step = u, t.row_scale[:, :, span.queries, None]
        if case.theta is not None:
            shift = (case.scheme.max_order - t.orders[index])[..., None].long()
            at_order = (u + (1 << shift) // 2) >> shift
            at_order = at_order << shift if shared else at_order
        if shared:
            finest = 2**case.scheme.max_order if case.theta is not None else 1
            step = step * (t.value_scale[:, :, :1, None] / finest)
        want = (t.probability_codes[:, :, span.queries].long() @ at_order).float() * step
        got = out[:, span.queries].unflatten(-1, (case.scheme.heads, -1)).transpose(1, 2)
        assert torch.equal(got, want)


@pytest.mark.parametrize("changes", CASES)
def test_codes_are_those_of_the_quantizers(changes: dict[str, Any], isa: str) -> None:
    case = Case(**changes)
    _, t = case.traced()
    q, k, v = case.operands()
    for x, name in ((q, "query"), (k, "key")):
        grid = affine_grid(x, case.bits)
        assert torch.equal(getattr(t, f"{name}_scale"), grid.scale[..., 0])
        assert torch.equal(getattr(t, f"{name}_zero"), grid.zero_point[..., 0].int())
        codes = affine_codes(x, grid, case.bits).to(torch.uint8)
        assert torch.equal(getattr(t, f"{name}_codes"), codes)
    value = case.spec().value
    assert value is not None
    shared = case.scheme.policy == "segment"
    grid = segment_grid(v, value, case.scheme.ends) if shared else affine_grid(v, case.bits)
    assert torch.equal(t.value_scale, grid.scale[..., 0])
    if case.theta is None:
        assert torch.equal(t.value_codes, affine_codes(v, grid, case.bits).int())
        return
    finest = torch.full(v.shape[:-1], case.scheme.max_order)
    codes = fixed_codes(v, grid, finest, case.bits, case.scheme.max_order)
    assert torch.equal(t.value_codes, ((codes - grid.zero_point) * 8).int())


@pytest.mark.parametrize("changes", CASES)
def test_the_simulated_modules_agree(changes: dict[str, Any]) -> None:
    case = Case(**changes)
    out = case.whole()
    spec = case.spec()
    scores, mix = QuantScores(spec, "cross"), QuantMix(spec, "cross")
    mix.theta = case.theta
    q, k, v = case.operands()
    for span in case.spans:
        p = scores(q[:, :, span.queries], k, span).softmax(-1)
        want = mix(p, v, span).transpose(1, 2).flatten(2)
        # A tie that falls the other way moves an output by a step of p times a step of v.
        assert (out[:, span.queries] - want).norm() / want.norm() < 1e-3


@pytest.mark.parametrize("changes", CASES)
def test_bits_do_not_depend_on_batch_threads_steps_or_instructions(changes: dict[str, Any]) -> None:
    case = Case(**changes)
    want = torch.cat([case.whole(slice(row, row + 1)) for row in range(len(case.q))])
    before, chosen = torch.get_num_threads(), binding.isa()
    try:
        for name in binding.features():
            assert binding.select_isa(name)
            torch.set_num_threads(2)
            assert torch.equal(case.whole(), want)
        cache = case.cache()
        for span in case.spans:
            step = case.q[:, span.queries].contiguous()
            alone = [span._replace(queries=slice(0, span.length))]
            assert torch.equal(case.ask(step, cache, alone), want[:, span.queries])
        assert cache.length == case.scheme.capacity
    finally:
        torch.set_num_threads(before)
        binding.select_isa(chosen)


def test_what_is_not_finite_is_named() -> None:
    case = Case()
    cache = case.cache()
    case.q[1, 4, 7], case.kv[0, 2, 90] = float("nan"), float("inf")
    with pytest.raises(NonFiniteError, match="layer cross: queries"):
        case.ask(case.q, cache, case.spans)
    with pytest.raises(NonFiniteError, match="layer cross"):
        case.cache()
