"""Seconds of choosing the rounding of one unit, measured on a few rows of it.

solving     moments by images; the closed form by its operations:
            a matrix inverted         inputs^3
            columns one by one        inputs x outputs
            products with the matrix  inputs^2 x outputs
comparing   by rows
learning    a step by rows
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from varptq.calibrate.clock import BlockClock
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.gptq import TRIED, corrected, inverse_factor, quadratic_loss, solved_rows
from varptq.calibrate.reconstruct import (
    EVALUATED_ROWS,
    VECTOR_BATCH,
    evaluate,
    optimizer_of,
    start,
    train_step,
    unit_layers,
)
from varptq.calibrate.record import Unit
from varptq.calibrate.solve import cross_moments, input_moments
from varptq.calibrate.unit_inputs import Inputs
from varptq.quant.affine import Grid
from varptq.quant.layers import QuantLinear

SOLVE, EVALUATE, LEARN = "solving", "comparing", "learning"
# Columns that are rounded one after the other, and inputs and outputs of a product with a matrix.
COLUMNS, INPUTS, OUTPUTS = 128, 1024, 256
# Rows of vectors that are read.
VECTORS = 64


@dataclass(frozen=True)
class Cost:
    """Seconds: `fixed`, and `each` for an image or a step."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, count: float) -> float:
        return self.fixed + self.each * count

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.fixed + other.fixed, self.each + other.each)

    def times(self, factor: float) -> Cost:
        return Cost(self.fixed * factor, self.each * factor)


Costs = dict[str, Cost]


@dataclass
class UnitProbe:
    """saved: bytes that a step of learning keeps for its gradients, the most of any unit so far."""

    clock: BlockClock
    calibration: CalibrationConfig
    saved: int = field(default=0, init=False)

    def costs(self, unit: Unit, rows: int) -> Costs:
        """By the first `rows` rows over tokens, two of which are an image. What reads conditions
        has all its rows here."""
        layers, settings = unit_layers(unit), self.calibration
        if not layers or not (settings.learns or settings.solves):
            return {}
        vectors, there = unit.sees_vectors, len(unit.inputs)
        whole = there if vectors else 2 * settings.num_samples
        few = part(unit, VECTORS if vectors else rows)
        count = len(few.inputs)
        found: Costs = {}
        if settings.solves:
            read, fixed = map(sum, zip(*(self._solving(few, x) for x in layers), strict=True))
            by_row = read / count
            found[SOLVE] = Cost(fixed + by_row * whole) if vectors else Cost(fixed, 2 * by_row)
        if settings.learns:
            batch = min(VECTOR_BATCH, there) if vectors else settings.batch_size
            step = self._step(unit, batch if vectors else min(batch, count), batch)
            found[LEARN] = Cost(each=step)
        times = 1 + settings.solves + 2 * settings.learns
        with self.clock.spell() as passing:
            evaluate(few, torch.arange(count, dtype=torch.int64, device="cpu"))
        by_row = passing.spent / count
        return found | {EVALUATE: Cost(fixed=times * min(EVALUATED_ROWS, whole) * by_row)}

    @torch.no_grad()
    def _solving(self, unit: Unit, layer: QuantLinear) -> tuple[float, float]:
        """Of the moments of these rows, and of the closed form."""
        weight, spec = layer.float_weight, layer.spec.weight
        assert weight is not None and spec is not None
        follows = unit.behind is not None and self.calibration.corrects(layer.spec)
        with self.clock.spell() as reading:
            if follows:
                moments, cross = cross_moments(unit, layer)
            else:
                moments, cross = input_moments(unit, layer), None
        outputs, inputs = weight.shape
        seconds, few = 0.0, slice(0, min(INPUTS, inputs))
        narrower = inputs / few.stop
        with self.clock.spell() as inverting:
            inverse_factor(moments[few, few])
        seconds += inverting.spent * narrower**3
        rows = weight[:OUTPUTS, few].float()
        if cross is not None:
            with self.clock.spell() as correcting:
                corrected(rows, moments[few, few], cross[few, few])
            seconds += correcting.spent * narrower**3
        with self.clock.spell() as multiplying:
            quadratic_loss(rows, moments[few, few])
        # Errors are spread over later columns, in half the time as they are float32, half of them
        # on average; of a table the loss of every size is taken, and the best is fitted.
        products = 0.25 if layer.quantizer.table is None else 1.5 * len(TRIED) + 0.5 + 1
        seconds += products * multiplying.spent * narrower**2 * outputs / len(rows)
        group = inputs // layer.scale.shape[1]
        groups = min(layer.scale.shape[1], max(1, COLUMNS // group))
        columns = slice(0, min(groups * group, COLUMNS, inputs))
        cut = weight[:, columns].float().unflatten(1, (groups, -1)).contiguous()
        grid = Grid(*(part[:, :groups] for part in layer.grid))
        with self.clock.spell() as rounding:
            bits, quantizer = spec.num_bits, layer.quantizer
            solved_rows(cut, grid, bits, moments[columns, columns], quantizer)
        return reading.spent, seconds + rounding.spent * inputs / columns.stop

    def _step(self, unit: Unit, rows: int, batch: int) -> float:
        """Of a step of learning on a batch, by one on `rows` rows."""
        layers, settings = unit_layers(unit), self.calibration
        alphas = [start(layer, settings).alpha for layer in layers]
        optimizer, kept = optimizer_of(alphas, settings), list[int]()
        few = torch.arange(rows, dtype=torch.int64, device="cpu")
        with self.clock.spell() as spell, saving(kept):
            train_step(unit, few, alphas, optimizer, settings.regularizer, settings.beta_start)
        for layer in layers:
            layer.finish_rounding()
        # What is as large as a weight does not grow with the rows.
        weights = {alpha.numel() * alpha.element_size() for alpha in alphas}
        fixed = sum(size for size in kept if size in weights)
        self.saved = max(self.saved, int(fixed + (sum(kept) - fixed) * batch / rows))
        return spell.spent * batch / rows


@dataclass(frozen=True)
class FirstRows:
    """The first rows of inputs, `count` of them."""

    inputs: Inputs
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows_R: Tensor) -> Any:
        return self.inputs[rows_R]


def part(unit: Unit, rows: int) -> Unit:
    """`unit` with its first rows alone, at most so many."""
    inputs = FirstRows(unit.inputs, min(rows, len(unit.inputs)))
    behind = None if unit.behind is None else FirstRows(unit.behind, len(inputs))
    return replace(unit, inputs=inputs, behind=behind)


@contextmanager
def saving(kept: list[int]) -> Iterator[None]:
    """Adds the sizes in bytes of what autograd saves meanwhile."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    kept += seen.values()


@contextmanager
def saving_apart(block: nn.Module, inside: list[int], outside: list[int]) -> Iterator[None]:
    """`saving`, of the passes through a block and of all else."""
    stack = ExitStack()
    # Of two in force the inner one is called.
    handles = (
        block.register_forward_pre_hook(lambda *_: stack.enter_context(saving(inside))),
        block.register_forward_hook(lambda *_: stack.close(), always_call=True),
    )
    with saving(outside):
        yield
    for handle in handles:
        handle.remove()
