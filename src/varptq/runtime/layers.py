"""Modules on integers for the Linear and norm seams, the same for every integer runtime.

    DeferredNorm, DeferredLayerNorm
                   pass x, scale and shift on; the quantizer normalises while it reads x
    GatedSumInPlace
                   what a branch adds, in the branch's place
    IntLinear      codes of the input x packed codes of the weight, then scale and bias
    PerImage, ByRows, PerRowAttention, PerRowCrossAttention
                   what the config leaves in float, so that an image does not depend on its batch

They compute with the `Kernels` object they are given. What is computed is defined by
`quant.layers.QuantLinear`, which `IntLinear` replaces. Shapes as in models/seams.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from varptq.models.blocks import Attention
from varptq.models.cross import CrossAttention, TextCache, TextGroup
from varptq.models.rotary import Rotary
from varptq.models.sampling import SERIAL_ELEMENTS
from varptq.models.scales import Scales
from varptq.models.seams import LAYER_NORM_EPS, GatedSum, LayerCache, ModulatedNorm, Span
from varptq.quant.buffers import TypedBuffers
from varptq.quant.layers import QuantLinear, mean_rows
from varptq.runtime.kernels import InputRule, Kernels, Pending, Weight

# A multiple of what torch computes with one instruction, on any machine.
VECTOR = 64


class DeferredNorm(ModulatedNorm):
    """The norm before an `IntLinear`, left for that layer to compute."""

    def forward(self, x_BLC: Tensor, scale_B1C: Tensor, shift_B1C: Tensor) -> Any:
        return Pending(x_BLC, scale_B1C, shift_B1C)


class DeferredLayerNorm(TypedBuffers):
    """A norm with a gain and a shift of its own, the same for every image, left in the same way:
    LayerNorm(x) (1 + (gain - 1)) + shift."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        assert norm.eps == LAYER_NORM_EPS, "that of every norm before a quantizer"
        self.register_buffer("scale_11C", norm.weight.detach().float().view(1, 1, -1) - 1)
        self.register_buffer("shift_11C", norm.bias.detach().float().view(1, 1, -1))

    def forward(self, x_BLC: Tensor) -> Pending:
        return Pending(x_BLC, self.get_buffer("scale_11C"), self.get_buffer("shift_11C"))


class GatedSumInPlace(GatedSum):
    """The same in the place of the branch: memory of its own would be fresh, page by page."""

    def forward(self, x_BLC: Tensor, branch_BLC: Tensor, gamma_B1C: Tensor | None = None) -> Tensor:
        if branch_BLC.dtype != x_BLC.dtype:
            return super().forward(x_BLC, branch_BLC, gamma_B1C)
        return (branch_BLC if gamma_B1C is None else branch_BLC.mul_(gamma_B1C)).add_(x_BLC)


class PerImage(nn.Module):
    """A float layer run on one image at a time, since the order in which a matrix product or a
    convolution sums depends on the number of its rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        # The layout of a slice, too, may depend on what it was cut from.
        images = (image.contiguous() for image in x.split(1))
        return torch.cat([self.inner(image, *args) for image in images])


class RowCaches(list[LayerCache]):
    """A cache for each row."""

    def rewind(self, length: int) -> None:
        for cache in self:
            cache.rewind(length)

    def first_rows(self, rows: int) -> RowCaches:
        return RowCaches(self[:rows])


class PerRowAttention(nn.Module):
    """An `Attention` whose products stay in float, run on one row of the batch at a time."""

    def __init__(self, inner: Attention) -> None:
        super().__init__()
        self.inner = inner

    def new_cache(self, rows: int, scales: Scales) -> RowCaches:
        return RowCaches(self.inner.new_cache(1, scales) for _ in range(rows))

    def forward(
        self,
        x_BLC: Tensor,
        spans: list[Span],
        caches: RowCaches | None = None,
        tables: Rotary | None = None,
    ) -> Tensor:
        rows = zip(x_BLC.split(1), caches or [None] * len(x_BLC), strict=True)
        return torch.cat([self.inner(row, spans, cache, tables) for row, cache in rows])


class PerRowCrossAttention(nn.Module):
    """A `CrossAttention` whose products stay in float, run on one row of the batch at a time."""

    def __init__(self, inner: CrossAttention) -> None:
        super().__init__()
        self.inner = inner

    def new_cache(self) -> TextCache:
        return TextCache()

    def forward(
        self,
        x_BLC: Tensor,
        spans: list[Span],
        text: Sequence[TextGroup],
        cache: TextCache | None = None,
    ) -> Tensor:
        cache = TextCache() if cache is None else cache
        if cache.keys is None:
            cache.keys = [TextCache() for _ in x_BLC]
        out_BLC = torch.empty_like(x_BLC)
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        for group in text:
            for row, text_1TC in zip(group.rows_R.tolist(), group.text_RTC.split(1), strict=True):
                alone = [TextGroup(first, text_1TC.contiguous())]
                out_BLC[row] = self.inner(x_BLC[row, None], spans, alone, cache.keys[row])[0]
        return out_BLC


class ByRows(nn.Module):
    """`by_rows` of an elementwise module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self.inner, x)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function that contains an exponential, computed so that a row's result depends
    on that row alone: torch uses other instructions at the end of a thread's share than before."""
    width = x.shape[-1]
    together = SERIAL_ELEMENTS // width if width % VECTOR == 0 else 1
    parts = x.reshape(-1, width).split(max(1, together))
    return torch.cat([function(part) for part in parts]).view(x.shape)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def tensors_of(packed: Any) -> dict[str, Tensor]:
    """The tensors of a packed weight by field."""
    return {name: t for name, t in packed._asdict().items() if isinstance(t, Tensor)}


def stored_weight(linear: QuantLinear) -> Weight:
    """The weight as kernels take it."""
    spec, table = linear.spec.weight, linear.quantizer.table
    assert spec is not None
    entries = table(spec.num_bits, linear.codes.device) if table else None
    return Weight(linear.codes, linear.scale, linear.zero_point, spec.num_bits, entries)


def input_rule(linear: QuantLinear, *, gelu: bool = False) -> InputRule | None:
    """How `linear` is quantized, or None where weight or input stays in float."""
    weight, input_ = linear.spec.weight, linear.spec.input
    if weight is None or input_ is None:
        return None
    return InputRule(
        layer=linear.layer,
        inputs=linear.in_features,
        type=input_.type,
        num_bits=input_.num_bits,
        range_rule=input_.range_rule,
        group=linear.input_group,
        weight_group=weight.group_for(linear.in_features, linear.layer),
        weight_zero_is_code=weight.range_rule != "min_max",
        block=linear.block,
        gelu=gelu,
    )


class IntLinear(TypedBuffers):
    """A `QuantLinear` on integers. Its input is a float tensor (B, l, K) or (B, K), or a `Pending`
    norm; its output is float32.

    The packed weight belongs to the kernels. `bias` (R, N) holds the bias plus W m for every scale,
    `means` (R, K) the means; each is None if there is none.
    """

    bias: Tensor | None
    means: Tensor | None

    def __init__(self, linear: QuantLinear, kernels: Kernels, rule: InputRule) -> None:
        super().__init__()
        self.layer, self.rule, self.kernels = linear.layer, rule, kernels
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.packed = kernels.pack(stored_weight(linear), rule)
        # Also as buffers, so that a state dict holds all that takes part in the result.
        for name, tensor in tensors_of(self.packed).items():
            self.register_buffer(f"packed_{name}", tensor)
        found = cast(Tensor | None, linear.bias)
        bias = None if found is None else found.detach().float().unsqueeze(0)
        if linear.centred:
            bias = linear.mean_bias if bias is None else bias + linear.mean_bias
        self.register_buffer("bias", bias)
        self.register_buffer("means", linear.means if linear.centred else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        names = tensors_of(self.packed)
        self.packed = self.packed._replace(**{n: self._buffers[f"packed_{n}"] for n in names})
        return self

    def forward(self, x: Tensor | Pending, spans: Sequence[Span] | None = None) -> Tensor:
        means, bias, rows = self._tables(spans)
        codes = self.kernels.quantize(x, self.rule, means, rows)
        return self.kernels.linear(codes, self.packed, bias, rows)

    def _tables(
        self, spans: Sequence[Span] | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Means, bias and (l,) int32 the row of both that each token takes; None where the first
        serves all, to which the tables are cut if all tokens are of one scale."""
        means, bias = self.means, self.bias
        if means is None or bias is None or spans is None or len(means) == 1:
            return means, bias, None
        scales = mean_rows(spans, len(means))
        if len(spans) == 1:
            only = slice(scales[0], scales[0] + 1)
            return means[only], bias[only], None
        lengths = [span.length for span in spans]
        found, counts = torch.tensor([scales, lengths], dtype=torch.int32, device="cpu")
        return means, bias, found.repeat_interleave(counts, output_size=sum(lengths))

    def extra_repr(self) -> str:
        return f"{self.layer}, in={self.in_features}, out={self.out_features}, {self.kernels.name}"
