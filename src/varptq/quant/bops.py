"""The BOP account: bit operations of the quantized transformer for one image without guidance.

A product of a b1-bit and a b2-bit operand costs b1 * b2: a Linear out * in * tokens * b_w * b_a, an
attention product H * l_q * l_k * c * b1 * b2 per scale. An operand left in float counts as 16 bits;
an online rotation of a Linear's input counts its additions at 16 bits.
Everything is an exact integer. Embeddings, normalisation, softmax, GELU, additions and the image
decoder are not counted.

Shift-and-sum's own cost is not part of it; see varptq.calibrate.theta. Source: docs/method.md
section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from varptq.models.scales import Scales

# A float operand counts as 16 bits, whatever dtype computes it here.
FLOAT_BITS, INT8 = 16, 8
# Kind of the entries for online rotations, which a float model does not have.
ROTATION = "rotation"
# Before the kinds of the products with a text.
CROSS = "cross_"


class LayerShape(NamedTuple):
    """A Linear as the account needs it. kind: what it is in any block, e.g. "fc2". Bits None: that
    side stays in float. rotation: block size of an online Hadamard rotation of its input."""

    name: str
    kind: str
    out_features: int
    in_features: int
    tokens_per_image: int
    weight_bits: int | None
    input_bits: int | None
    rotation: int | None = None


class ProductShape(NamedTuple):
    """The two products of an attention module. Bits None: that operand stays in float. text: tokens
    of the text that the queries see in place of tokens of the image."""

    name: str
    num_heads: int
    head_dim: int
    query_bits: int | None
    key_bits: int | None
    probability_bits: int | None
    value_bits: int | None
    text: int | None = None


@dataclass(frozen=True)
class BopsEntry:
    """One matrix product; in attention the cached operand (k, v) takes the place of the weight. Or
    the additions of one rotation.
    """

    name: str
    kind: str
    macs_per_image: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        return self.macs_per_image * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class BopsAccount:
    """All products of one model. `float_total` is the same model with every operand in 16 bits."""

    entries: tuple[BopsEntry, ...]

    @property
    def total(self) -> int:
        return sum(entry.bops for entry in self.entries)

    @property
    def float_total(self) -> int:
        products = (entry for entry in self.entries if entry.kind != ROTATION)
        return sum(entry.macs_per_image for entry in products) * FLOAT_BITS**2

    @property
    def on_int8(self) -> int:
        """What a multiplier of 8 bits does: it gains nothing from narrower operands."""
        return sum(
            entry.bops
            if entry.kind == ROTATION
            else entry.macs_per_image
            * max(INT8, entry.weight_bits)
            * max(INT8, entry.activation_bits)
            for entry in self.entries
        )

    def by_kind(self) -> dict[str, int]:
        """BOPs per kind (mat_qkv, fc1, query_key, ...), in order of first appearance."""
        return self._sums(lambda entry: entry.kind)

    def by_layer(self) -> dict[str, int]:
        """BOPs per named product."""
        return self._sums(lambda entry: entry.name)

    def _sums(self, key: Callable[[BopsEntry], str]) -> dict[str, int]:
        sums: dict[str, int] = {}
        for entry in self.entries:
            sums[key(entry)] = sums.get(key(entry), 0) + entry.bops
        return sums

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "total": self.total,
            "float_total": self.float_total,
            "by_kind": self.by_kind(),
            "by_layer": self.by_layer(),
        }


def linear_entry(layer: LayerShape) -> BopsEntry:
    """out * in * tokens at the layer's widths."""
    macs = layer.out_features * layer.in_features * layer.tokens_per_image
    weight_bits, input_bits = layer.weight_bits or FLOAT_BITS, layer.input_bits or FLOAT_BITS
    return BopsEntry(layer.name, layer.kind, macs, weight_bits, input_bits)


def rotation_entry(layer: LayerShape, block: int) -> BopsEntry:
    """log2(block) additions of 16-bit numbers per element of the input."""
    additions = layer.in_features * layer.tokens_per_image * (block.bit_length() - 1)
    return BopsEntry(f"{layer.name}.rotation", ROTATION, additions, 1, FLOAT_BITS)


def product_entries(product: ProductShape, scales: Scales) -> tuple[BopsEntry, BopsEntry]:
    """Query-key and probability-value product: H * c * sum over scales of l_q * l_k each.

    l_k counts the cached tokens, those of the scale itself included, or those of the text.
    """
    keys = scales.ends if product.text is None else (product.text,) * scales.num_scales
    pairs = sum(l_q * l_k for l_q, l_k in zip(scales.lengths, keys, strict=True))
    macs = product.num_heads * product.head_dim * pairs
    name, _, _, q, k, p, v, text = product
    kind = "" if text is None else CROSS
    operands = (("query_key", k, q), ("probability_value", v, p))
    first, second = (
        BopsEntry(f"{name}.{what}", f"{kind}{what}", macs, a or FLOAT_BITS, b or FLOAT_BITS)
        for what, a, b in operands
    )
    return first, second


def account(
    layers: Iterable[LayerShape], products: Iterable[ProductShape], scales: Scales
) -> BopsAccount:
    """The account of a model given as plain descriptions of its Linears and attention modules."""
    entries: list[BopsEntry] = []
    for layer in (LayerShape(*layer) for layer in layers):
        entries.append(linear_entry(layer))
        if layer.rotation is not None:
            entries.append(rotation_entry(layer, layer.rotation))
    for product in products:
        entries.extend(product_entries(ProductShape(*product), scales))
    return BopsAccount(tuple(entries))
