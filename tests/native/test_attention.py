"""Attention on codes in the native core: every integer against int64 arithmetic of torch, the whole
against the simulated modules, and the bits against batch, threads, steps and instruction sets.

The oracle takes the codes that a call traced and repeats what follows from them; that the codes are
right is a test of its own, on queries and keys without the norm, whose sum has an order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from varptq.errors import NonFiniteError
from varptq.models.rotary import Rotary
from varptq.models.seams import Span
from varptq.native import binding
from varptq.quant.affine import affine_codes, affine_grid
from varptq.quant.attention import QuantMix, QuantScores, segment_grid
from varptq.quant.config import AttentionSpec, TensorSpec
from varptq.quant.quantizers import QUANTIZERS
from varptq.quant.shift_sum import fixed_codes, orders
from varptq.runtime.cpu_scheme import book

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason() or "built"),
]

attention = pytest.importorskip("varptq.native.attention")

# Scales of 1, 3, 36 and 65 tokens: the third ends within 64 places of its beginning, the fourth far
# behind.
ENDS = (1, 4, 40, 105)
# What a cache holds behind its tokens must not count.
GARBAGE = 0xA5
# A code moves by one step where float32 softmaxes differ in their last bits and it sat on a tie:
# p / s is off by at most 255 * 2e-6 steps.
TIE_WIDTH = 1e-3
# Sums of 105 terms of float32 in another order.
ROUNDING = 2e-6
SPANS = [Span(slice(a, b), ENDS[: i + 1]) for i, (a, b) in enumerate(pairwise((0, *ENDS)))]


class Case:
    """One layer's scheme and inputs."""

    def __init__(self, seed: int = 0, rows: int = 2, **changes: Any) -> None:
        given = {"heads": 3, "head_width": 20, "ends": ENDS, "policy": "token", "l2_norm": False}
        given |= dict.fromkeys(("query_bits", "key_bits", "value_bits", "probability_bits"), 8)
        self.theta, rotary = changes.pop("theta", None), changes.pop("rotary", False)
        changes.setdefault("shift_sum", self.theta is not None)
        self.type = "codebook" if changes.pop("codebook", False) else "affine"
        if self.type == "codebook":
            for what in ("query", "key", "value"):
                changes[f"{what}_book"] = book("codebook", changes[f"{what}_bits"])
        self.scheme = attention.AttentionScheme(**{**given, **changes})
        heads, width = self.scheme.heads, self.scheme.head_width
        g = torch.Generator().manual_seed(seed)
        self.qkv = 2 * torch.randn(rows, ENDS[-1], 3 * heads * width, generator=g)
        self.biases = torch.randn(2, heads * width, generator=g)
        self.factor = torch.rand(heads, generator=g) + 0.5
        angles = 50 * torch.randn(ENDS[-1], width // 2, generator=g)
        self.tables = Rotary(angles.cos(), angles.sin()) if rotary else None

    def run(
        self, qkv: Tensor, cache: Any, spans: list[Span], trace: Any = None, layer: str = ""
    ) -> Tensor:
        return attention.attend(
            self.scheme,
            qkv,
            cache,
            spans,
            query_bias_C=self.biases[0],
            value_bias_C=self.biases[1],
            query_factor_H=self.factor,
            tables=self.tables,
            theta=self.theta,
            trace=trace,
            layer=layer,
        )

    def forced(self, trace: Any = None, qkv: Tensor | None = None) -> Tensor:
        """All scales in one call."""
        qkv = self.qkv if qkv is None else qkv
        cache = attention.AttentionCache(self.scheme, len(qkv))
        cache.data.fill_(GARBAGE)
        return self.run(qkv, cache, SPANS, trace)

    def traced(self) -> tuple[Tensor, Any]:
        trace = attention.new_trace(self.scheme, len(self.qkv), ENDS[-1], len(SPANS))
        return self.forced(trace), trace

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, L, c) as the float model has them before quantization."""
        width = self.qkv.shape[-1] // 3
        bias = torch.cat((self.biases[0], torch.zeros(width), self.biases[1]))
        heads = (self.qkv + bias).unflatten(-1, (3, self.scheme.heads, self.scheme.head_width))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if self.scheme.l2_norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q = q * self.factor[:, None, None]
        if self.tables is None:
            return q, k, v
        everywhere = slice(0, ENDS[-1])
        return self.tables.turn(q, everywhere), self.tables.turn(k, everywhere), v

    def spec(self) -> AttentionSpec:
        """The same layer for the simulated modules."""
        s = self.scheme
        return AttentionSpec(
            policy=s.policy,
            query=TensorSpec(num_bits=s.query_bits, type=self.type),
            key=TensorSpec(num_bits=s.key_bits, type=self.type),
            probability=TensorSpec(num_bits=s.probability_bits, type="uniform"),
            value=TensorSpec(
                num_bits=s.value_bits,
                type=self.type,
                strategy="token" if s.policy == "token" else "head",
            ),
            max_order=s.max_order,
        )


CASES = [
    {},
    {"head_width": 64, "rows": 1},
    {"head_width": 8, "heads": 1, "query_bits": 2, "key_bits": 8, "value_bits": 5},
    {"head_width": 128, "query_bits": 8, "key_bits": 8, "rows": 1},
    {"head_width": 1, "query_bits": 4, "key_bits": 4, "value_bits": 4, "probability_bits": 4},
    {"policy": "segment", "value_bits": 4},
    {"policy": "segment", "head_width": 64, "probability_bits": 2},
    {"value_bits": 4, "theta": 0.01},
    {"policy": "segment", "value_bits": 4, "theta": 0.02, "head_width": 64},
    {"value_bits": 6, "max_order": 1, "theta": 0.0},
    {"l2_norm": True},
    {"rotary": True},
    {"rotary": True, "l2_norm": True, "policy": "segment", "head_width": 64, "value_bits": 4},
    {"rotary": True, "head_width": 128, "rows": 1, "value_bits": 4, "theta": 0.02},
    {"codebook": True, "query_bits": 4, "key_bits": 5, "value_bits": 6, "max_order": 0},
    {"codebook": True, "query_bits": 4, "key_bits": 4, "value_bits": 4, "max_order": 0},
    {"policy": "segment", "head_width": 64, "query_bits": 3, "key_bits": 3, "value_bits": 3},
    {
        **{"codebook": True, "query_bits": 2, "key_bits": 6, "value_bits": 4, "head_width": 128},
        **{"max_order": 0, "theta": 0.02, "l2_norm": True},
    },
]


@pytest.mark.parametrize("changes", CASES)
def test_scores_and_outputs_are_the_integers_of_the_codes(
    changes: dict[str, Any], isa: str
) -> None:
    case = Case(**changes)
    out, t = case.traced()
    q = t.query_codes.long() - t.query_zero[..., None]
    k = t.key_codes.long() - t.key_zero[..., None]
    exact = (q @ k.transpose(-1, -2)).float()
    scores = exact * (t.query_scale[..., None] * t.key_scale[..., None, :])
    for index, (queries, (*_, keys), _) in enumerate(SPANS):
        seen = t.scores[:, :, queries, :keys]
        assert torch.equal(seen, scores[:, :, queries, :keys])
        p = t.probability_codes[:, :, queries, :keys].long()
        assert not t.probability_codes[:, :, queries, keys:].any()
        got = out[:, queries].unflatten(-1, (case.scheme.heads, -1)).transpose(1, 2)
        row_scale = t.row_scale[:, :, queries, None]
        want = mixed(case, t, p, keys, t.orders[index, ..., :keys], row_scale)
        assert torch.equal(got, want)


def mixed(case: Case, t: Any, p: Tensor, keys: int, order: Tensor, row_scale: Tensor) -> Tensor:
    """Outputs (B, H, l, c) from traced codes."""
    u = (t.value_codes.long() - t.value_zero[..., None])[:, :, :keys]
    shared = case.scheme.policy == "segment"
    if case.theta is not None:
        shift = (case.scheme.max_order - order)[..., None].long()
        u = (u + (1 << shift) // 2) >> shift
        u = u << shift if shared else u
    if not shared:
        return (p @ u).float() * row_scale
    finest = 2**case.scheme.max_order if case.theta is not None else 1
    out = None
    for start, end in pairwise((0, *(e for e in ENDS if e <= keys))):
        step = row_scale * (t.value_scale[:, :, start, None, None] / finest)
        part = (p[..., start:end] @ u[:, :, start:end]).float() * step
        out = part if out is None else out + part
    assert out is not None
    return out


@pytest.mark.parametrize("changes", CASES)
def test_codes_are_those_of_the_quantizers(changes: dict[str, Any], isa: str) -> None:
    case = Case(**changes)
    _, t = case.traced()
    s = case.scheme
    q, k, v = case.operands()
    exact = not s.l2_norm
    spec = case.spec()
    check_codes(q, spec.query, t.query_codes, t.query_scale, t.query_zero, exact)
    check_codes(k, spec.key, t.key_codes, t.key_scale, t.key_zero, exact)
    value = spec.value
    assert value is not None
    if value.type == "codebook":
        return check_codes(v, value, t.value_codes, t.value_scale, t.value_zero, exact=True)
    grid = segment_grid(v, value, ENDS) if s.policy == "segment" else affine_grid(v, s.value_bits)
    assert torch.equal(t.value_scale, grid.scale[..., 0])
    if case.theta is None:
        assert torch.equal(t.value_zero, grid.zero_point[..., 0].int())
        want = affine_codes(v, grid, s.value_bits)
    else:
        finest = torch.full(v.shape[:-1], s.max_order)
        codes = fixed_codes(v, grid, finest, s.value_bits, s.max_order)
        want = (codes - grid.zero_point) * 2**s.max_order
    assert torch.equal(t.value_codes, want.int())


def check_codes(
    x: Tensor, spec: TensorSpec | None, codes: Tensor, scale: Tensor, zero: Tensor, exact: bool
) -> None:
    assert spec is not None
    row = QUANTIZERS[spec.type]
    grid = row.grid_of(x, spec)
    want = row.integers(row.codes(x, grid, spec.num_bits), grid, spec.num_bits)
    found = (codes - zero[..., None].int()).float()
    if exact:
        assert torch.equal(scale, grid.scale[..., 0])
        assert torch.equal(found, want)
        assert not row.even_steps or torch.equal(zero, grid.zero_point[..., 0].int())
        return
    torch.testing.assert_close(scale, grid.scale[..., 0], rtol=ROUNDING, atol=0)
    off = found != want
    if not row.even_steps:
        assert float(off.float().mean()) < TIE_WIDTH
        return
    position = (x / grid.scale)[off]
    assert ((position - position.floor() - 0.5).abs() < TIE_WIDTH).all()


@pytest.mark.parametrize("changes", CASES)
def test_probabilities_and_orders_follow_the_scores(changes: dict[str, Any]) -> None:
    case = Case(**changes)
    _, t = case.traced()
    s = case.scheme
    moved = 0
    for index, (queries, (*_, keys), _) in enumerate(SPANS):
        p = t.scores[:, :, queries, :keys].softmax(-1)
        order = t.orders[index, ..., :keys]
        if case.theta is not None:
            mean = p.mean(-2)
            near = (mean / max(case.theta, 1e-30)).log2() % 1
            want = orders(mean, case.theta, s.max_order)
            sure = (near > TIE_WIDTH) & (near < 1 - TIE_WIDTH)
            assert torch.equal(order[sure].long(), want[sure])
        step = t.value_scale[:, :, :keys] / torch.exp2(order.float())
        largest = step.amax(-1, keepdim=True)
        relative = step / largest if s.policy == "token" else torch.ones_like(step)
        folded = p * relative[:, :, None]
        top = 2**s.probability_bits - 1
        unit = folded.amax(-1, keepdim=True).clamp(min=1e-6) / top
        steps = folded / unit
        off = t.probability_codes[:, :, queries, :keys].float() != steps.round()
        assert ((steps - steps.floor() - 0.5).abs()[off] < TIE_WIDTH).all()
        moved += int(off.sum())
        factor = largest[..., None] if s.policy == "token" else 1
        want = (unit * factor)[..., 0]
        torch.testing.assert_close(t.row_scale[:, :, queries], want, rtol=ROUNDING, atol=0)
    assert moved <= 2


@pytest.mark.parametrize("changes", CASES)
def test_the_simulated_modules_agree(changes: dict[str, Any]) -> None:
    case = Case(**changes)
    out = case.forced()
    spec = case.spec()
    scores, mix = QuantScores(spec, "attn"), QuantMix(spec, "attn")
    mix.theta = case.theta
    q, k, v = case.operands()
    for span in SPANS:
        queries, keys = span.queries, span.keys
        p = scores(q[:, :, queries], k[:, :, :keys], span).softmax(-1)
        want = mix(p, v[:, :, :keys], span).transpose(1, 2).flatten(2)
        # A tie that falls the other way moves an output by a step of p times a step of v.
        error = (out[:, queries] - want).norm() / want.norm()
        assert error < 1e-3, (queries, error)


@given(
    rows=st.integers(1, 9),
    width=st.sampled_from([8, 20, 64]),
    threads=st.integers(1, 3),
    policy=st.sampled_from(["token", "segment"]),
    theta=st.sampled_from([None, 0.02]),
    rotary=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_bits_do_not_depend_on_batch_threads_or_steps(
    rows: int, width: int, threads: int, policy: str, theta: float | None, rotary: bool, seed: int
) -> None:
    changes = {"policy": policy, "theta": theta, "rotary": rotary, "value_bits": 4}
    case = Case(seed, rows, head_width=width, l2_norm=True, **changes)
    want = torch.cat([case.forced(qkv=row) for row in case.qkv.split(1)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(case.forced(), want)
        cache = attention.AttentionCache(case.scheme, rows)
        for queries, ends, _ in SPANS:
            step = case.qkv[:, queries]
            span = [Span(slice(0, step.shape[1]), ends)]
            assert torch.equal(case.run(step, cache, span), want[:, queries])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("changes", CASES)
def test_every_instruction_set_gives_the_same_bits(changes: dict[str, Any]) -> None:
    outputs = []
    for name in (*binding.features(), *binding.EMULATED):
        if binding.select_isa(name):
            outputs.append(Case(**changes).forced())
    assert len(outputs) >= len(binding.features())
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_a_cache_of_four_bits_takes_half_the_room() -> None:
    eight, four = Case(head_width=64), Case(head_width=64, key_bits=4, value_bits=4)
    orders = Case(head_width=64, key_bits=8, value_bits=4, theta=0.01)
    size = {
        name: attention.AttentionCache(case.scheme, 1).data.numel()
        for name, case in (("eight", eight), ("four", four), ("orders", orders))
    }
    codes = 2 * 3 * 64 * ENDS[-1]  # of three heads
    assert size["eight"] - size["four"] >= codes / 2
    assert size["orders"] == size["eight"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 70, 179])
def test_what_is_not_finite_is_named(bad: float, at: int) -> None:
    case = Case()
    cache = attention.AttentionCache(case.scheme, 2)
    case.qkv[1, 7, at] = bad
    with pytest.raises(NonFiniteError, match=r"layer blocks\.3\.attn"):
        case.run(case.qkv, cache, SPANS, layer="blocks.3.attn")
    assert cache.length == 0


def test_extremes_of_codes_do_not_overflow(isa: str) -> None:
    """All queries at one end of the codes, all keys at the other, at the widest head."""
    case = Case(head_width=128, rows=1, heads=1)
    case.biases.zero_()
    case.qkv[..., :128], case.qkv[..., 128:256] = 1.0, -1.0
    case.qkv[:, ::2, :256] *= -1
    case.qkv[..., 256:] = case.qkv[..., :128]
    out, t = case.traced()
    assert t.scores.abs().max() == 255 * 255 * 128 * t.query_scale[0, 0, 0] * t.key_scale[0, 0, 0]
    q, k, v = case.operands()
    for queries, (*_, keys), _ in SPANS:
        p = (q[:, :, queries] @ k[:, :, :keys].transpose(-1, -2)).softmax(-1)
        want = (p @ v[:, :, :keys]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out[:, queries], want, rtol=1e-3, atol=0.02)
