"""What a runtime on integers has to offer: the operations behind `IntLinear` and `IntAttention`.

    quantize   float rows -> codes, a scale and a zero point per row and group
    linear     codes x packed weight -> exact integer sums -> float32
    attend     q, k, v of new tokens -> codes in a cache -> exact integer products -> float32
    read       k, v of texts -> codes;   answer   q of tokens over them, in the same way
    map_codes  a map, or its norm -> codes of every image;   convolution   of these

The modules in layers.py, attention.py and convolutions.py are the same for every runtime; a runtime
is one object with these methods, and says by name what it cannot execute. The definitions are those
of `varptq.quant`, so two runtimes give equal codes and equal integers on equal inputs, and floats
that differ by rounding. Shapes: M rows, K inputs, N outputs, G groups, R rows whose texts are of
one length; the rest as in models/seams.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from varptq.models import finite
from varptq.models.convolutions import Taps
from varptq.models.rotary import Rotary
from varptq.models.sampling import Sampler
from varptq.models.seams import Span
from varptq.quant.affine import RangeRule
from varptq.quant.config import AttentionSpec
from varptq.quant.quantizers import QUANTIZERS

# The zero point of entries in unsigned bytes.
CODEBOOK_ZERO = 128


class Pending(NamedTuple):
    """A modulated norm that the next layer computes: LayerNorm(x) (1 + scale) + shift."""

    x_BLC: Tensor
    scale_B1C: Tensor
    shift_B1C: Tensor


@dataclass(frozen=True)
class InputRule:
    """How the input of one Linear becomes codes, in this order: `gelu`, means, rotation in blocks
    of `block`, codes; and how its weight was cut. `type` is a row of `QUANTIZERS`. Groups None: one
    scale per row."""

    layer: str
    inputs: int
    type: str
    num_bits: int
    range_rule: RangeRule
    group: int | None
    weight_group: int | None
    weight_zero_is_code: bool
    block: int | None
    gelu: bool = False

    @property
    def sign_split(self) -> bool:
        """Whether codes are signed, with a scale per side."""
        return self.type == "sign_split"

    @property
    def codebook(self) -> bool:
        """Whether codes are entries of a table, plus `CODEBOOK_ZERO` in a byte."""
        return QUANTIZERS[self.type].table is not None


class Weight(NamedTuple):
    """The quantized weight of a Linear: codes (N, K) uint8, scale and zero_point (N, G) float32.
    table: (2^b,) int8, what the codes of a codebook stand for, their zero points being 0."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    num_bits: int
    table: Tensor | None = None

    def in_bytes(self) -> Weight:
        """Entries of a codebook as codes of 8 bits about `CODEBOOK_ZERO`, for kernels that know no
        tables."""
        if self.table is None:
            return self
        bytes_of = (self.table.int() + CODEBOOK_ZERO).to(torch.uint8)
        zero_point = torch.full_like(self.scale, CODEBOOK_ZERO)
        return Weight(bytes_of[self.codes.int()], self.scale, zero_point, 8)


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """What the attention of one block computes, over tokens or over a text.

    qkv has no bias yet: q_bias and v_bias (C,) come first. With `l2_norm` q and k become unit
    vectors; then q is multiplied by `q_factor` (H,), the temperature or a share of 1 / sqrt(c).
    """

    layer: str
    spec: AttentionSpec
    theta: float | None
    num_heads: int
    head_width: int
    l2_norm: bool
    q_bias: Tensor
    v_bias: Tensor
    q_factor: Tensor

    def check_finite(self, operands: Tensor) -> None:
        """Raises `NonFiniteError` naming the layer if q, k or v holds NaN or infinity."""
        message = f"layer {self.layer}: q, k or v holds NaN or infinity"
        finite.require(operands.isfinite().all(), message)


class NormRule(NamedTuple):
    """A norm of maps: GroupNorm with weight and bias (C,) float32, then SiLU where `silu`."""

    groups: int
    weight_C: Tensor
    bias_C: Tensor
    eps: float
    silu: bool


class PendingMap(NamedTuple):
    """A norm of maps that the next convolution computes."""

    x_BCHW: Tensor
    norm: NormRule


class Map(NamedTuple):
    """Float32 maps (N, H, W, C), contiguous, and what the runtime that made them found on the way,
    for itself; None for maps of others."""

    x_NHWC: Tensor
    found: Any = None


class Kernels(Protocol):
    """The operations of one runtime. Packed weights, rows of codes and caches are opaque: only the
    runtime that made them reads them."""

    @property
    def name(self) -> str: ...

    def refuse_linear(self, rule: InputRule) -> str | None:
        """What cannot be executed of this layer, for an error message; None if all can."""
        ...

    def refuse_attention(self, rule: AttentionRule) -> str | None: ...

    def pack(self, weight: Weight, rule: InputRule) -> Any:
        """The weight in the layout that `linear` takes, a tuple with tensors."""
        ...

    def quantize(
        self, x: Tensor | Pending, rule: InputRule, means: Tensor | None, rows: Tensor | None
    ) -> Any:
        """Codes of x (B, l, K) or (B, K). Token i takes row `rows[i]`, (l,) int32, of means (R, K)
        float32. Raises `NonFiniteError` naming the layer if x holds NaN or infinity."""
        ...

    def linear(self, codes: Any, packed: Any, bias: Tensor | None, rows: Tensor | None) -> Tensor:
        """float32 (..., N). Token i takes row `rows[i]` of bias (R, N) float32."""
        ...

    def new_cache(self, rule: AttentionRule, rows: int, ends: tuple[int, ...]) -> Any:
        """An empty cache for `rows` rows, with room for all tokens of scales that end at `ends`."""
        ...

    def attend(
        self,
        qkv_BlD: Tensor,
        rule: AttentionRule,
        cache: Any,
        spans: Sequence[Span],
        tables: Rotary | None = None,
    ) -> Tensor:
        """Add l tokens, qkv (B, l, 3 C), to the cache; return their outputs, float32 (B, l, C).
        `tables`, for `TextKernels` only, turn q and k last, before they become codes. Raises
        `NonFiniteError` naming the layer if qkv holds NaN or infinity."""
        ...

    def phi(self, phi: nn.Conv2d) -> nn.Module:
        """phi(h) of the token map computed so that an image does not depend on its batch."""
        ...

    def sampler(self) -> Sampler:
        """How ids are drawn, so that an image does not depend on its batch."""
        ...


@runtime_checkable
class TextKernels(Kernels, Protocol):
    """A runtime that also executes models which read texts: rotary positions in `attend`, and
    attention over keys that are there before any query."""

    def read(self, kv_RTD: Tensor, rule: AttentionRule) -> Any:
        """Codes of the keys and values of texts, kv (R, T, 2 C). Raises `NonFiniteError`."""
        ...

    def answer(
        self, q_RlC: Tensor, rule: AttentionRule, cache: Any, spans: Sequence[Span]
    ) -> Tensor:
        """Outputs of queries, float32 (R, l, C), over what `read` returned; `spans` are over the
        text, and `q_bias` is in the queries already. Raises `NonFiniteError`."""
        ...


@runtime_checkable
class ImageKernels(Protocol):
    """A runtime that also executes the convolutions of an autoencoder. What is done to an image
    depends on that image alone; how codes lie is the runtime's matter."""

    @property
    def name(self) -> str: ...

    def takes_convolution(self, weight_OIkk: Tensor, taps: Taps) -> bool:
        """Whether it executes one of this shape; others are computed in float."""
        ...

    def pack_convolution(self, weight_OIkk: Tensor, scale_O: Tensor, taps: Taps) -> Any:
        """int8 codes and float32 steps in the layout that `convolution` takes, a tuple with
        tensors."""
        ...

    def map_codes(self, x: Map, norm: NormRule | None, layer: str) -> Any:
        """Codes of maps or of their norm. Raises `NonFiniteError` naming the layer for NaN or
        infinity."""
        ...

    def affine(self, x: Map, norm: NormRule) -> tuple[Tensor, Tensor]:
        """Gain and shift (N, C) float32: what the norm multiplies a map with and adds."""
        ...

    def convolution(
        self, codes: Any, packed: Any, bias_O: Tensor | None, taps: Taps, skip: Tensor | None
    ) -> Map:
        """(N, H', W', O), with skip (N, H', W', O) float32 added, whose memory the result may
        take."""
        ...
