"""The table of quantizers: a row says what one computes, and where it may stand.

    grid(x)   scales of the slices of x        codes(x, grid)        integers
                                               values(codes, grid)   what they stand for, x^

The arithmetic is pure functions in a file of the quantizer's name. Everybody else asks the row: the
config, which types an operand may have; simulated layers and attention, for values and gradients;
GPTQ, for the nearest code; the artifact and the runtimes, what they can store and execute. A new
quantizer is such a file and a row; CONTRIBUTING.md shows one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from varptq.quant import affine, codebook, log2, sign_split, straight_through, uniform
from varptq.quant.affine import Dims, Grid, RangeRule

MIN_BITS, MAX_BITS = 2, 8
LINEAR_OPERANDS = ("weight", "input")
ATTENTION_OPERANDS = ("query", "key", "probability", "value")


class Spec(Protocol):
    """What a row reads of a `TensorSpec`."""

    @property
    def num_bits(self) -> int: ...

    @property
    def range_rule(self) -> RangeRule: ...


def unsigned(num_bits: int) -> range:
    """0 to 2^b - 1: the codes that b bits hold."""
    return range(2**num_bits)


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One quantizer.

    grid: (x, num_bits, dims) -> the grid of every slice of x over `dims`, tensors that broadcast to
        x. With `range_rules` it takes the range rule as a fourth argument. A weight is stored with
        a `Grid`: scale, which its values are proportional to, and a zero point that is a code.
    codes: (x, grid, num_bits) -> integer-valued floats. values: (codes, grid, num_bits) -> floats.
        Both are elementwise in the dtype of the grid.
    operands: what it may quantize, with the strategies it has there.
    levels: num_bits -> the codes; those of a weight are unsigned and fit the bits.
    plain: arguments as `grid`; the values of x's own codes with the gradient that defines them, of
        the grid too or found in one go. Without it the gradient of x^ goes to x as it is.
    trained: as `plain`, its gradient written out (straight_through.py) where autograd is slow.
    symmetric: as many codes below 0 as above, and no zero point.
    even_steps: on a `Grid`, values are (code - zero point) scale and codes the nearest; learned
        rounding needs that, and so do copies of attention values.
    table: (num_bits, device) -> (2^b,) int8; on a `Grid` with zero points 0, values are
        table[code] scale. Integer kernels multiply the table's entries, and GPTQ fits the scale.
        Attention values need even steps or a table.
    nearest: on its own grid a code stands for the value nearest to x.
    unitless: 2^k x has the codes of x, under the range rule "with_zero".
    widths: the numbers of bits it exists for.
    kernels: the runtimes that execute it on integers; "simulated" executes every row.
    """

    grid: Callable[..., Any]
    codes: Callable[[Tensor, Any, int], Tensor]
    values: Callable[[Tensor, Any, int], Tensor]
    operands: Mapping[str, tuple[str, ...]]
    levels: Callable[[int], range] = unsigned
    plain: Callable[..., Tensor] | None = None
    trained: Callable[..., Tensor] | None = None
    range_rules: bool = False
    symmetric: bool = False
    even_steps: bool = False
    table: Callable[[int, torch.device | None], Tensor] | None = None
    nearest: bool = True
    unitless: bool = False
    widths: range = range(MIN_BITS, MAX_BITS + 1)
    kernels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = (*LINEAR_OPERANDS, *ATTENTION_OPERANDS)
        if unknown := [name for name in self.operands if name not in known]:
            raise ValueError(f"operand {unknown[0]!r}, expected one of {', '.join(known)}")
        if "value" in self.operands and not (self.even_steps or self.table):
            raise ValueError(
                "operand 'value' needs even_steps or a table: its products fold the scale out"
            )
        for num_bits in self.widths if "weight" in self.operands else ():
            levels = self.levels(num_bits)
            if levels[0] < 0 or levels[-1] >= 2**num_bits:
                raise ValueError(f"operand 'weight': codes {levels} do not fit {num_bits} bits")

    @property
    def signed(self) -> bool:
        """Whether codes are below zero, too."""
        return self.levels(self.widths[0])[0] < 0

    def grid_of(self, x: Tensor, spec: Spec, dims: Dims = -1) -> Any:
        """The grid of every slice of x over `dims`, which stay as dimensions of size 1."""
        return self.grid(x, *self._said(spec, dims))

    def fake(self, x: Tensor, spec: Spec, dims: Dims = -1) -> Tensor:
        """x on its own grid, same shape and dtype, with the gradient that defines it."""
        if self.plain is not None:
            return self.plain(x, *self._said(spec, dims))
        with torch.no_grad():
            grid = self.grid_of(x, spec, dims)
            values = self.values(self.codes(x, grid, spec.num_bits), grid, spec.num_bits)
        return straight_through.passed(x, values.to(x.dtype))

    def straight_through(self, x: Tensor, spec: Spec, dims: Dims = -1) -> Tensor:
        """`fake`, by its written gradient where it has one."""
        if self.trained is None:
            return self.fake(x, spec, dims)
        return self.trained(x, *self._said(spec, dims))

    def integers(self, codes: Tensor, grid: Grid, num_bits: int) -> Tensor:
        """What codes stand for in units of the scale, in the dtype of the grid."""
        return self.values(codes, Grid(torch.ones_like(grid.scale), grid.zero_point), num_bits)

    def _said(self, spec: Spec, dims: Dims) -> tuple[Any, ...]:
        rest = (spec.range_rule,) if self.range_rules else ()
        return (spec.num_bits, dims, *rest)


EVERYWHERE = ("reference", "cpu", "cuda")

QUANTIZERS = {
    "affine": Quantizer(
        grid=affine.affine_grid,
        codes=affine.affine_codes,
        values=lambda codes, grid, num_bits: affine.affine_values(codes, grid),
        plain=affine.affine_fake,
        trained=straight_through.affine_fake,
        operands={
            "weight": ("channel", "group"),
            "input": ("group", "token"),
            "query": ("token",),
            "key": ("channel", "token"),
            "value": ("head", "token"),
        },
        range_rules=True,
        even_steps=True,
        unitless=True,
        kernels=EVERYWHERE,
    ),
    "codebook": Quantizer(
        grid=codebook.codebook_grid,
        codes=codebook.codebook_codes,
        values=codebook.codebook_values,
        plain=codebook.codebook_fake,
        operands={
            "weight": ("channel", "group"),
            "input": ("token", "group"),
            "query": ("token",),
            "key": ("token",),
            "value": ("token",),
        },
        table=codebook.entries,
        nearest=False,
        unitless=True,
        widths=range(2, 7),
        kernels=EVERYWHERE,
    ),
    "sign_split": Quantizer(
        grid=sign_split.sign_split_grid,
        codes=sign_split.sign_split_codes,
        values=lambda codes, grid, num_bits: sign_split.sign_split_values(codes, grid),
        plain=sign_split.sign_split_fake,
        trained=straight_through.sign_split_fake,
        operands={"input": ("group", "token")},
        levels=sign_split.sign_split_range,
        symmetric=True,
        kernels=EVERYWHERE,
    ),
    "log2": Quantizer(
        grid=log2.log2_scale,
        codes=log2.log2_codes,
        values=log2.log2_values,
        plain=log2.log2_fake,
        trained=straight_through.log2_fake,
        operands={"probability": ("token",)},
        levels=log2.log2_range,
        nearest=False,
        kernels=("reference",),
    ),
    "uniform": Quantizer(
        grid=uniform.uniform_scale,
        codes=uniform.uniform_codes,
        values=lambda codes, grid, num_bits: uniform.uniform_values(codes, grid),
        plain=uniform.uniform_fake,
        trained=straight_through.uniform_fake,
        operands={"probability": ("token",)},
        kernels=EVERYWHERE,
    ),
}


def types_of(operand: str) -> dict[str, tuple[str, ...]]:
    """The types that may quantize an operand, each with its strategies there."""
    rows = QUANTIZERS.items()
    return {name: row.operands[operand] for name, row in rows if operand in row.operands}
