"""Rounding of a unit in closed form: second moments of what its layers read, and GPTQ on them.

    H = sum_t w_t x_t x_t^T       x what meets the weight: transformed, quantized, behind the
                                  quantized layers before it
    C = sum_t w_t x'_t x_t^T      x' what the float model's layer reads, transformed

gptq.py says what is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.gptq import corrected, solved_rows
from varptq.calibrate.prefix import Arguments, heard
from varptq.calibrate.record import ROWS_PER_BATCH, Unit
from varptq.quant.layers import QuantLinear


@torch.no_grad()
def solve(unit: Unit, layers: list[QuantLinear], config: CalibrationConfig) -> None:
    """GPTQ of every layer in order; a layer's inputs come from the quantized layers before it."""
    for layer in layers:
        weight, spec, grid = layer.float_weight, layer.spec.weight, layer.grid
        assert weight is not None and spec is not None
        rows = weight.float().unflatten(1, (layer.scale.shape[1], -1))
        if unit.behind is not None and config.corrects(layer.spec):
            moments, cross = cross_moments(unit, layer)
            rows = corrected(weight.float(), moments, cross).view_as(rows)
            del cross
            if layer.quantizer.table is not None:
                grid = layer.quantizer.grid_of(rows, spec)
        else:
            moments = input_moments(unit, layer)
        codes, grid = solved_rows(rows, grid, spec.num_bits, moments, layer.quantizer)
        codes, scale = codes.flatten(1).to(torch.uint8), grid.scale.squeeze(-1)
        layer.load_codes(codes, scale, layer.zero_point)


def _position_weights(unit: Unit, layer: QuantLinear) -> Tensor | None:
    """w_t: those of the loss, 1 / l_k. Where a codebook's moments are taken, their roots, half way
    to counting every token once: closer in tokens and as good in images (docs/log.md)."""
    weights = unit.token_weights
    return weights if weights is None or layer.quantizer.table is None else weights.sqrt()


def _weighted_rows(x: Tensor, weights: Tensor | None) -> Tensor:
    """(rows, in) float32 of inputs (..., tokens, in), each times the root of its token's weight."""
    x = x.float()
    if weights is not None:
        x = x * weights.sqrt().to(x.device).unsqueeze(-1)
    return x.flatten(0, -2)


def _reads(layer: torch.nn.Module, run: Callable[[], Any]) -> list[Arguments]:
    """What `run` calls a layer with: over tokens once, over texts once for each of their
    lengths."""
    return heard(layer, run, enough=_over_tokens)


def _over_tokens(arguments: Arguments) -> bool:
    """Whether a layer was called with the spans of its tokens, which a text has not."""
    return len(arguments) > 1


def input_moments(unit: Unit, layer: QuantLinear) -> Tensor:
    """(in, in) float64 sum of w_t x_t x_t^T over all inputs of the layer's weight: every row of the
    unit once; tokens of texts count the same."""
    total = _zeros(layer)
    for rows in _batches(unit):
        for read in _reads(layer, lambda rows=rows: unit.run(unit.met[rows])):
            weights = _position_weights(unit, layer) if _over_tokens(read) else None
            x = _weighted_rows(layer.quantized_input(*read), weights)
            total.add_(x.T @ x)
    return total


def cross_moments(unit: Unit, layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """`input_moments` and (in, in) float64 sum of w_t x'_t x_t^T, from one pass: x' what the layer
    of the float model reads on the float model's inputs, x what meets the weight behind the
    quantized layers; tokens of texts count the same."""
    assert unit.float_module is not None and unit.behind is not None
    total, cross = _zeros(layer), _zeros(layer)
    float_layer = unit.float_module.get_submodule(
        layer.layer.removeprefix(unit.name).removeprefix(".")
    )
    for rows in _batches(unit):
        plain = _reads(float_layer, lambda rows=rows: unit.reference(unit.inputs[rows]))
        met = _reads(layer, lambda rows=rows: unit.run(unit.met[rows]))
        for of_float, of_quantized in zip(plain, met, strict=True):
            weights = _position_weights(unit, layer) if _over_tokens(of_float) else None
            x = _weighted_rows(layer.quantized_input(*of_quantized), weights)
            total.add_(x.T @ x)
            cross.add_(_weighted_rows(layer.plain_input(*of_float), weights).T @ x)
    return total, cross


def _zeros(layer: QuantLinear) -> Tensor:
    """(in, in) float64."""
    width = layer.in_features
    return torch.zeros(width, width, dtype=torch.float64, device=layer.codes.device)


def _batches(unit: Unit) -> tuple[Tensor, ...]:
    """Numbers of the unit's rows."""
    numbers = torch.arange(len(unit.inputs), dtype=torch.int64, device="cpu")
    return numbers.split(ROWS_PER_BATCH)
