"""What the integers of runtime "cpu" do not hold is refused by name, with the core and without."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from varptq import QuantConfig
from varptq.runtime.kernels import AttentionRule, InputRule
from varptq.runtime.limits import MAX_HEAD_WIDTH, MAX_SEGMENT, refuse_attention, refuse_linear

LINEAR = InputRule(
    layer="fc1",
    inputs=3 * MAX_SEGMENT,
    num_bits=8,
    range_rule="with_zero",
    type="affine",
    group=192,
    weight_group=384,
    weight_zero_is_code=True,
    block=None,
)


def attention(preset: str = "w4a4", **changes: object) -> AttentionRule:
    spec = QuantConfig.preset(preset).attention
    assert spec is not None
    none = torch.zeros(0)
    rule = AttentionRule("attn", spec, None, 2, 64, True, q_bias=none, v_bias=none, q_factor=none)
    return dataclasses.replace(rule, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"range_rule": "min_max"}, "input range rule 'min_max'"),
        ({"range_rule": "min_max", "type": "sign_split"}, None),
        ({"weight_zero_is_code": False}, "weight range rule 'min_max'"),
        ({"group": 256, "weight_group": 384}, "256 and weight groups of 384, which do not nest"),
        ({"group": None, "weight_group": MAX_SEGMENT}, None),
        ({"group": None, "weight_group": None}, f"at most {MAX_SEGMENT}"),
    ],
)
def test_linear_layers(changes: dict[str, object], words: str | None) -> None:
    found = refuse_linear(dataclasses.replace(LINEAR, **changes))
    assert found is None if words is None else words in (found or "")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (attention(), None),
        (attention(theta=0.01), None),
        (attention(head_width=MAX_HEAD_WIDTH), None),
        (attention(head_width=MAX_HEAD_WIDTH + 1), "head width 129, at most 128"),
        (attention("w4a4+paper"), "attention policy 'release'"),
        (attention("w4a4+renorm"), "renormalized probabilities"),
    ],
)
def test_attention(rule: AttentionRule, words: str | None) -> None:
    found = refuse_attention(rule)
    assert found is None if words is None else words in (found or "")
