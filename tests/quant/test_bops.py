"""The account against a count made token by token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varptq.models.scales import Scales
from varptq.quant.bops import LayerShape, ProductShape, account, layer_kind, tokens_per_image

BITS = st.one_of(st.none(), st.integers(2, 8))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 130),
    BITS,
    BITS,
)
def test_products_count_every_query_with_every_key(sides, heads, width, left, right):
    scales = Scales.of(sides)
    scale_of = scales.scale_of_L().tolist()
    pairs = sum(q >= k for q in scale_of for k in scale_of)
    ours = account(
        [], [ProductShape("blocks.0.attn", heads, width, left, right, right, left)], scales
    )
    expected = heads * width * pairs * (left or 16) * (right or 16)
    assert [entry.bops for entry in ours.entries] == [expected, expected]


def test_operands_of_the_products_are_not_mixed_up():
    ours = account([], [ProductShape("a", 1, 1, 2, 3, 5, 7)], Scales((1,)))
    assert ours.by_layer() == {"a.query_key": 6, "a.probability_value": 35}


@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 680), BITS, BITS)
def test_linear(out, in_, tokens, weight, input_):
    ours = account([LayerShape("head", out, in_, tokens, weight, input_)], [], Scales((1, 2)))
    assert ours.total == out * in_ * tokens * (weight or 16) * (input_ or 16)
    assert ours.float_total == out * in_ * tokens * 256


@pytest.mark.parametrize(
    ("name", "kind", "tokens"),
    [
        ("word_embed", "word_embed", 13),
        ("blocks.11.ada_lin.1", "ada_lin", 3),
        ("shared_ada_lin.1", "shared_ada_lin", 3),
        ("head_nm.ada_lin.1", "ada_lin", 3),
        ("blocks.0.attn.mat_qkv", "mat_qkv", 14),
        ("head", "head", 14),
    ],
)
def test_tokens_and_kinds(name, kind, tokens):
    assert layer_kind(name) == kind
    assert tokens_per_image(name, Scales((1, 2, 3))) == tokens


def test_equal_sides_are_counted_once_each():
    """The released code collects token counts in a set, where equal sides collapse; ours sums."""
    assert tokens_per_image("head", Scales((1, 2, 2))) == 9


def test_account_as_a_document():
    layers = [LayerShape(f"blocks.{i}.ffn.fc1", 4, 8, 5, 4, 8) for i in range(2)]
    ours = account(layers, [ProductShape("blocks.0.attn", 2, 64, 8, 8, 8, 8)], Scales((1, 2)))
    assert list(ours.by_kind()) == ["fc1", "query_key", "probability_value"]
    assert ours.by_kind()["fc1"] == 2 * 4 * 8 * 5 * 32
    assert sum(ours.by_kind().values()) == sum(ours.by_layer().values()) == ours.total
    assert json.loads(json.dumps(ours.to_dict()))["total"] == ours.total
