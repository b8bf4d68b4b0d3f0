"""Triton's attention on codes against the simulated modules, scale by scale and all at once."""

import math

import pytest
import torch
from torch.nn import functional as F

from varptq.errors import NonFiniteError
from varptq.models.scales import Scales
from varptq.models.seams import spans_of
from varptq.quant.attention import QuantMix, QuantScores
from varptq.quant.config import USUAL_TYPE, AttentionSpec, TensorSpec
from varptq.quant.quantizers import QUANTIZERS
from varptq.runtime.cuda.kernels import CudaKernels
from varptq.runtime.kernels import AttentionRule

SIDES, ENDS, ROWS, HEADS = (1, 2), (1, 5), 2, 2
# policy, bits of q and k, of v, theta, head width, unit vectors. Orders only where they fit int8.
# On codebooks where a type is named and has the width.
CASES = [
    ("token", 8, 8, None, 20, True),
    ("token", 4, 4, 0.05, 20, True),
    ("segment", 6, 4, 0.05, 20, True),
    ("token", 8, 6, None, 20, False),
    ("token", 4, 6, 0.05, 20, True, "codebook"),
    ("token", 8, 3, None, 64, False, "codebook"),
    ("token", 5, 8, None, 20, False, "codebook"),
]


def rule_of(
    policy: str,
    bits: int,
    value_bits: int,
    theta: float | None,
    head: int,
    unit: bool,
    kind: str = USUAL_TYPE,
    *,
    device: str,
) -> AttentionRule:
    def spec(n: int, strategy: str = "token") -> TensorSpec:
        type_ = kind if n in QUANTIZERS[kind].widths else USUAL_TYPE
        return TensorSpec(num_bits=n, type=type_, strategy=strategy, range_rule="with_zero")

    value = spec(value_bits, "head" if policy == "segment" else "token")
    orders = {} if QUANTIZERS[value.type].even_steps else {"max_order": 0}
    attention = AttentionSpec(
        policy=policy,
        query=spec(bits),
        key=spec(bits),
        probability=TensorSpec(num_bits=8, type="uniform"),
        value=value,
        **orders,
    )
    generator = torch.Generator().manual_seed(1)
    q_bias, v_bias = torch.randn(2, HEADS * head, generator=generator).to(device)
    factor = torch.tensor([5.0, 9.0]) if unit else torch.full((HEADS,), 0.25 / math.sqrt(head))
    return AttentionRule(
        "attn", attention, theta, HEADS, head, unit, q_bias, v_bias, factor.to(device)
    )


def operands(qkv: torch.Tensor, rule: AttentionRule) -> tuple[torch.Tensor, ...]:
    """q, k, v (B, H, l, c) as the float model makes them."""
    bias = torch.cat((rule.q_bias, torch.zeros_like(rule.q_bias), rule.v_bias))
    q, k, v = (qkv + bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if rule.l2_norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return q * rule.q_factor.view(1, HEADS, 1, 1), k, v


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_the_simulated_modules(case: tuple, device: str) -> None:
    rule = rule_of(*case, device=device)
    kernels = CudaKernels()
    assert kernels.refuse_attention(rule) is None
    scores, mix = QuantScores(rule.spec, "scores"), QuantMix(rule.spec, "mix")
    mix.theta = rule.theta
    qkv = torch.randn(
        ROWS, ENDS[-1], 3 * HEADS * rule.head_width, generator=torch.Generator().manual_seed(0)
    ).to(device)
    q, k, v = operands(qkv, rule)
    spans = spans_of(Scales(SIDES))
    expected = torch.cat(
        [
            mix(scores(q[:, :, s.queries], k[:, :, : s.keys], s).softmax(-1), v[:, :, : s.keys], s)
            for s in spans
        ],
        dim=2,
    )
    expected = expected.transpose(1, 2).flatten(2)
    whole = kernels.attend(qkv, rule, kernels.new_cache(rule, ROWS, ENDS), spans)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    cache = kernels.new_cache(rule, ROWS, ENDS)
    steps = [
        kernels.attend(qkv[:, span.queries], rule, cache, spans_of(Scales(SIDES), k, k + 1))
        for k, span in enumerate(spans)
    ]
    assert torch.equal(torch.cat(steps, dim=1), whole)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"policy": "release"}, "policy 'release'"),
        ({"renormalize": True}, "renormalized"),
        ({"query": None}, "in float"),
    ],
)
def test_what_it_lacks_is_named(changes: dict, reason: str, device: str) -> None:
    rule = rule_of("token", 8, 8, None, 20, True, device=device)
    if changes.get("policy") == "release":
        head = rule.spec.value.replace(strategy="head")
        changes = {**changes, "value": head}
    spec = rule.spec.replace(**changes)
    values = {name: getattr(rule, name) for name in rule.__dataclass_fields__}
    said = CudaKernels().refuse_attention(AttentionRule(**{**values, "spec": spec}))
    assert said is not None and reason in said


def test_what_is_not_finite_is_refused_by_layer_and_enters_no_cache(device: str) -> None:
    rule = rule_of("token", 8, 8, None, 20, True, device=device)
    kernels = CudaKernels()
    cache = kernels.new_cache(rule, ROWS, ENDS)
    qkv = torch.zeros(ROWS, 1, 3 * HEADS * rule.head_width, device=device)
    qkv[1, 0, -1] = math.inf
    with pytest.raises(NonFiniteError, match="layer attn: q, k or v holds NaN or infinity"):
        kernels.attend(qkv, rule, cache, spans_of(Scales(SIDES), 0, 1))
    assert cache.length == 0 and not cache.v.any()
