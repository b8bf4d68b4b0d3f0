"""The simulated quantized Linear: what stands in the Linear seams of the float model.

    y = fake(t(x)) W^T + b,    W the values of codes on a grid per output row and group,
                               t an optional transform of the input (transforms.py)

It computes in float on dequantized codes ("simulated"): what a type computes is in its row of
quantizers.py, and runtimes on integers are held against this layer. The attention
products are in attention.py. Shapes as in models/seams.py; G groups of g input channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.seams import Span
from varptq.quant import adaround
from varptq.quant.affine import Grid, affine_values, check_finite, from_groups, to_groups
from varptq.quant.buffers import TypedBuffers
from varptq.quant.config import InputTransform, LinearSpec, TensorSpec
from varptq.quant.quantizers import QUANTIZERS, Quantizer
from varptq.quant.straight_through import passed, rounded_weight
from varptq.quant.transforms import (
    centred_bias,
    hadamard,
    rotate_weight,
    transformed,
)


def weight_grid(weight: Tensor, spec: TensorSpec, layer: str) -> tuple[Tensor, Grid]:
    """Cut a weight (out, in) into (out, G, g) float32 and find its grid, scale and zero_point (out,
    G, 1)."""
    group = spec.group_for(weight.shape[1], layer)
    rows = to_groups(weight.float(), group or weight.shape[1])
    if rows.is_meta:
        # Shapes are all there is, and torch would load its compiler to follow the arithmetic.
        shape = (*rows.shape[:-1], 1)
        return rows, Grid(
            *(torch.empty(shape, dtype=rows.dtype, device=rows.device) for _ in range(2))
        )
    grid = QUANTIZERS[spec.type].grid_of(rows, spec)
    if not bool(torch.isfinite(grid.scale).all()):
        raise NonFiniteError(f"layer {layer}: weight holds NaN or infinity; repair the checkpoint")
    return rows, grid


class LearnedRounding(nn.Module):
    """A weight while its rounding is learned: codes = floor(w / s) + z + h(alpha), or of a table
    the entry below and h(alpha)."""

    def __init__(
        self, rows: Tensor, grid: Grid, num_bits: int, hard: bool, table: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid, self.num_bits, self.hard = grid, num_bits, hard
        self.table = None if table is None else table.float()
        if self.table is None:
            self.floor, alpha = adaround.floor_codes(rows, grid), adaround.init_alpha(rows, grid)
        else:
            self.floor, share = adaround.entries_below(rows, grid, self.table)
            alpha = adaround.alpha_of(share)
        self.alpha = nn.Parameter(alpha)

    def weight(self) -> Tensor:
        """(out, in) float32 weight, differentiable in alpha: rounded by the sign of alpha (`hard`)
        or by the fraction h(alpha)."""
        floor, alpha, grid = self.floor, self.alpha, self.grid
        if self.table is not None:
            values = adaround.entry_values(floor, alpha, grid, self.table, hard=self.hard)
        elif self.hard:
            values = rounded_weight(floor, alpha, grid, self.num_bits)
        else:
            values = affine_values(adaround.soft_codes(floor, alpha, self.num_bits), grid)
        return values.flatten(1)

    def hard_codes(self) -> Tensor:
        """(out, G, g) integer-valued codes: h rounded to 0 or 1 by the sign of alpha."""
        return adaround.hard_codes(self.floor, self.alpha.detach(), self.num_bits)


class TunedWeight(nn.Module):
    """A weight while it is tuned: s exp(change) for s, and for every code the one nearest to what
    it stands for plus `shift`, in units of the scale."""

    def __init__(self, codes_OGg: Tensor, grid: Grid, quantizer: Quantizer, num_bits: int) -> None:
        super().__init__()
        self.grid, self.quantizer, self.num_bits = grid, quantizer, num_bits
        self.unit = Grid(torch.ones_like(grid.scale), grid.zero_point)
        self.integers = quantizer.values(codes_OGg.float(), self.unit, num_bits)
        self.change = nn.Parameter(torch.zeros_like(grid.scale))
        self.shift = nn.Parameter(torch.zeros_like(self.integers))

    @property
    def step(self) -> float:
        """Mean distance of neighbours among what codes stand for, in units of the scale."""
        ends = [0.0, 2.0**self.num_bits - 1]
        codes = torch.tensor(ends, dtype=torch.float32, device=self.integers.device)
        first = Grid(*(part[:1, :1] for part in self.unit))
        low, high = self.quantizer.values(codes, first, self.num_bits).flatten().tolist()
        return (high - low) / ends[1]

    def scale(self) -> Tensor:
        """(out, G, 1) float32, above 0."""
        return self.grid.scale * self.change.exp()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(out, G, g) integer-valued."""
        return self.quantizer.codes(self.integers + self.shift, self.unit, self.num_bits)

    def weight(self) -> Tensor:
        """(out, in) float32 weight, differentiable in `change`, and in `shift` as if nothing were
        rounded."""
        found = self.quantizer.values(self.codes(), self.unit, self.num_bits)
        return (passed(self.shift, found) * self.scale()).flatten(1)


def mean_rows(spans: Sequence[Span], num_rows: int) -> list[int]:
    """Which row of a table of means the tokens of each span take. A schedule of more scales than
    the table has rows takes the last one for the rest, and says so."""
    if spans[-1].scale >= num_rows:
        warnings.warn(
            f"scale {spans[-1].scale + 1} was not calibrated: means of the finest of {num_rows} "
            "scales stand in; quantize at this size if quality matters",
            stacklevel=2,
        )
    return [min(span.scale, num_rows - 1) for span in spans]


class QuantLinear(TypedBuffers):
    """A Linear with quantized weight and/or input.

    Buffers: `codes` (out, in) uint8, `scale` and `zero_point` (out, G) float32; a weight kept in
    float (spec.weight None) stays a parameter instead. A rotation of the input is folded into
    either. With centring, `means` (K, in) and `mean_bias` (K, out) float32 hold a row per scale, or
    one row for a layer that sees no tokens. No cast of the model reaches them: grids give codes
    their values, and means leave a small difference of large numbers. `rounding` and `tuning` exist
    only during calibration.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    means: Tensor
    mean_bias: Tensor

    def __init__(
        self, linear: nn.Linear, spec: LinearSpec, layer: str, num_scales: int = 1
    ) -> None:
        super().__init__()
        self.layer, self.spec = layer, spec
        transform = spec.input_transform or InputTransform()
        self.centred, self.block = transform.center, transform.block_for(linear.in_features, layer)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bias = linear.bias
        self.input_group = spec.input.group_for(self.in_features, layer) if spec.input else None
        self.rounding: LearnedRounding | None = None
        self.tuning: TunedWeight | None = None
        self._cached_weight: Tensor | None = None
        weight = linear.weight.detach()
        if self.centred:
            for name, width in (("means", self.in_features), ("mean_bias", self.out_features)):
                table = torch.zeros(num_scales, width, dtype=torch.float32, device=weight.device)
                self.register_buffer(name, table)
        if self.block and not weight.is_meta:
            weight = rotate_weight(weight, self.block)
        self.float_weight: Tensor | None = weight
        if spec.weight is None:
            self.weight = nn.Parameter(weight, requires_grad=False) if self.block else linear.weight
            return
        rows, grid = weight_grid(weight, spec.weight, layer)
        self.register_buffer("codes", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("scale", grid.scale.squeeze(-1))
        self.register_buffer("zero_point", grid.zero_point.squeeze(-1))
        if not rows.is_meta:
            rows = self.quantizer.codes(rows, grid, spec.weight.num_bits)
        self._set_codes(rows)

    @property
    def weight_bits(self) -> int | None:
        return self.spec.weight.num_bits if self.spec.weight else None

    @property
    def quantizer(self) -> Quantizer:
        """That of the weight."""
        assert self.spec.weight is not None
        return QUANTIZERS[self.spec.weight.type]

    @property
    def grid(self) -> Grid:
        """Scale and zero_point as (out, G, 1)."""
        return Grid(self.scale.unsqueeze(-1), self.zero_point.unsqueeze(-1))

    @property
    def codes_grouped(self) -> Tensor:
        """uint8 codes as (out, G, g)."""
        return self.codes.unflatten(1, (self.scale.shape[1], -1))

    def _set_codes(self, codes_OGg: Tensor) -> None:
        self.codes = codes_OGg.flatten(1).to(torch.uint8)
        self._cached_weight = None

    def load_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Replace the quantized weight: codes (out, in) uint8, scale and zero_point (out, G)."""
        self.codes, self.scale, self.zero_point = codes, scale, zero_point
        self._cached_weight = None

    def set_means(self, means_Ki: Tensor) -> None:
        """Centre the input on these means, a row per scale; the bias gains W m with the float W, so
        the mean's way through the layer has no weight error either."""
        assert self.centred and self.float_weight is not None
        # A copy: layers may be given the same means, and an artifact stores no shared memory.
        self.means = means_Ki.to(self.float_weight.device, torch.float32, copy=True)
        # The float weight is the rotated one, and so must the means be.
        rotated = hadamard(self.means, self.block) if self.block else self.means
        self.mean_bias = centred_bias(self.float_weight, rotated)

    def start_rounding(self, *, hard: bool) -> LearnedRounding:
        """Make the rounding of this weight learnable, starting at the float weight.

        Raises `ConfigError` for a type with neither even steps nor a table."""
        spec, row = self.spec.weight, self.quantizer
        assert spec is not None and self.float_weight is not None
        if not (row.even_steps or row.table):
            raise ConfigError(
                f"layer {self.layer}: weight type {spec.type!r} has no learned rounding; use "
                "rounding gptq or nearest"
            )
        rows = to_groups(self.float_weight.float(), self.codes_grouped.shape[-1])
        table = row.table(spec.num_bits, rows.device) if row.table else None
        self.rounding = LearnedRounding(rows, self.grid, spec.num_bits, hard, table)
        return self.rounding

    def finish_rounding(self) -> None:
        """Take the hard codes and forget the learned state."""
        assert self.rounding is not None
        self._set_codes(self.rounding.hard_codes())
        self.rounding = None

    def start_tuning(self) -> TunedWeight:
        """Make the scales and the codes of this weight learnable."""
        assert self.weight_bits is not None
        self.tuning = TunedWeight(self.codes_grouped, self.grid, self.quantizer, self.weight_bits)
        return self.tuning

    def finish_tuning(self) -> None:
        """Take the tuned scales and codes."""
        tuned = self.tuning
        assert tuned is not None
        self.tuning = None
        codes, scale = tuned.codes().flatten(1).to(torch.uint8), tuned.scale().detach().squeeze(-1)
        self.load_codes(codes, scale, self.zero_point)

    def drop_float_weight(self) -> None:
        """Let go of the float weight of the source model; no more learning after this."""
        self.float_weight = None

    def dequantized(self) -> Tensor:
        """(out, in) float32 weight from the codes."""
        assert self.weight_bits is not None
        codes = self.codes_grouped.float()
        return self.quantizer.values(codes, self.grid, self.weight_bits).flatten(1)

    def current_weight(self, dtype: torch.dtype) -> Tensor:
        if self.spec.weight is None:
            return self.weight
        learned = self.rounding or self.tuning
        if learned is not None:
            return learned.weight().to(dtype)
        cached = self._cached_weight
        if cached is None or cached.dtype != dtype or cached.device != self.codes.device:
            # Kept for later calls, which may want gradients: not an inference tensor.
            with torch.inference_mode(False):
                cached = self._cached_weight = self.dequantized().to(dtype)
        return cached

    def fake_input(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """The transformed input on its grid: per token, or per group of channels of a token. Raises
        as `check_finite`."""
        spec = self.spec.input
        if spec is None:
            return transformed(x, mean, self.block)
        check_finite(x, self.layer)
        group = self.input_group
        rows = to_groups(transformed(x, mean, self.block), group)
        fake = QUANTIZERS[spec.type].straight_through(rows, spec)
        return from_groups(fake) if group else fake

    def plain_input(self, x: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        """`quantized_input` before it is quantized."""
        return transformed(
            x, self._tables(spans, x.device)[0] if self.centred else None, self.block
        )

    def quantized_input(self, x: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        """What the weight is multiplied with: x (..., in) transformed and on its grid."""
        return self.fake_input(x, self._tables(spans, x.device)[0] if self.centred else None)

    def forward(self, x: Tensor, spans: Sequence[Span] | None = None) -> Tensor:
        mean, gained = self._tables(spans, x.device) if self.centred else (None, None)
        fake = self.fake_input(x, mean)
        y = F.linear(fake, self.current_weight(x.dtype), self.bias)
        return y if gained is None else (y + gained).to(y.dtype)

    def _tables(self, spans: Sequence[Span] | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean (l, in) and what it is worth in the output (l, out) for every token; one row for a
        layer that sees no tokens."""
        if spans is None:
            assert len(self.means) == 1, f"layer {self.layer} wants to know its tokens' scales"
            return self.means, self.mean_bias
        found = mean_rows(spans, len(self.means))
        lengths = [span.length for span in spans]
        scales, counts = torch.tensor([found, lengths], dtype=torch.int64, device=device)
        rows = scales.repeat_interleave(counts, output_size=sum(lengths))
        return self.means[rows], self.mean_bias[rows]

    def extra_repr(self) -> str:
        return f"{self.layer}, in={self.in_features}, out={self.out_features}"
