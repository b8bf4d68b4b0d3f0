"""The account against a count made token by token."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varptq.models.scales import Scales
from varptq.models.var.transformer import VAR, VARArch
from varptq.quant.bops import LayerShape, ProductShape, account
from varptq.quant.describe import describe_linears

BITS = st.one_of(st.none(), st.integers(2, 8))


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 130),
    BITS,
    BITS,
)
def test_products_count_every_query_with_every_key(sides, heads, width, left, right):
    scales = Scales(sides)
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
    layer = LayerShape("head", "head", out, in_, tokens, weight, input_)
    ours = account([layer], [], Scales((1, 2)))
    assert ours.total == out * in_ * tokens * (weight or 16) * (input_ or 16)
    assert ours.float_total == out * in_ * tokens * 256


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_and_kinds(shared):
    """What the Linears of the model say of themselves; equal sides are counted once each, which the
    released code, collecting token counts in a set, does not."""
    with torch.device("meta"):
        var = VAR(VARArch(3, 2, 8, 2, Scales((1, 2, 2)), 11, 5, True, shared))
    found = {
        layer.name: (layer.kind, layer.tokens_per_image) for layer in describe_linears(var, None)
    }
    block = {"attn.mat_qkv": "mat_qkv", "attn.proj": "proj", "ffn.fc1": "fc1", "ffn.fc2": "fc2"}
    blocks = {f"blocks.{i}.{name}": (kind, 9) for i in (0, 1) for name, kind in block.items()}
    own = {f"blocks.{i}.ada_lin.1": ("ada_lin", 3) for i in (0, 1)}
    ada = {"shared_ada_lin.1": ("shared_ada_lin", 3)} if shared else own
    ada["head_nm.ada_lin.1"] = ("ada_lin", 3)
    assert found == {"word_embed": ("word_embed", 8), **blocks, **ada, "head": ("head", 9)}


def test_account_as_a_document():
    layers = [LayerShape(f"blocks.{i}.ffn.fc1", "fc1", 4, 8, 5, 4, 8) for i in range(2)]
    ours = account(layers, [ProductShape("blocks.0.attn", 2, 64, 8, 8, 8, 8)], Scales((1, 2)))
    assert list(ours.by_kind()) == ["fc1", "query_key", "probability_value"]
    assert ours.by_kind()["fc1"] == 2 * 4 * 8 * 5 * 32
    assert sum(ours.by_kind().values()) == sum(ours.by_layer().values()) == ours.total
    assert json.loads(json.dumps(ours.to_dict()))["total"] == ours.total
