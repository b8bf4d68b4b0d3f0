"""What a runtime on integers has to offer: the operations behind `IntLinear` and `IntAttention`.

    quantize   float rows -> codes, a scale and a zero point per row and group
    linear     codes x packed weight -> exact integer sums -> float32
    attend     q, k, v of new tokens -> codes in a cache -> exact integer products -> float32

The modules in layers.py and attention.py are the same for every runtime; a runtime is one object
with these methods, and says by name what it cannot execute. The definitions are those of
`varptq.quant`, so two runtimes give equal codes and equal integers on equal inputs, and floats that
differ by rounding. Shapes: M rows, K inputs, N outputs, G groups; the rest as in models/seams.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from varptq.models.sampling import Sampler
from varptq.models.seams import Span
from varptq.quant.affine import RangeRule
from varptq.quant.config import AttentionSpec


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


class Weight(NamedTuple):
    """The quantized weight of a Linear: codes (N, K) uint8, scale and zero_point (N, G) float32."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    num_bits: int


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """What the attention of one block computes.

    qkv has no bias yet: q_bias and v_bias (C,) come first. With `l2_norm` q and k become unit
    vectors; then q is multiplied by `q_factor` (H,), the temperature or 0.25 / sqrt(c).
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
        self, qkv_BlD: Tensor, rule: AttentionRule, cache: Any, spans: Sequence[Span]
    ) -> Tensor:
        """Add l tokens, qkv (B, l, 3 C), to the cache; return their outputs, float32 (B, l, C).
        Raises `NonFiniteError` naming the layer if qkv holds NaN or infinity."""
        ...

    def phi(self, phi: nn.Conv2d) -> nn.Module:
        """phi(h) of the token map computed so that an image does not depend on its batch."""
        ...

    def sampler(self) -> Sampler:
        """How ids are drawn, so that an image does not depend on its batch."""
        ...
