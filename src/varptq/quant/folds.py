"""Rewritings of a float transformer that leave its function as it is and change what its quantizers
see: they run before conversion and cost nothing afterwards.

    scale_input     W u = (W / d) (d u),
                    d u = (1 + s') LN(x) + b'  with  s' = d s + d - 1,  b' = d b
    shift_input     W u + a = W (u + o) + (a - W o),  u + o by b' = b + o
    scale_values    P V W^T = (P V d) (W / d)^T

Every one is exact in real numbers. They change the model they are given, in place: hand them a
copy. Which d or o is somebody else's question, and where they go the model says (`folds()`).
Shapes: C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from varptq.models.seams import NormFold, ValueFold


def _rows(linear: nn.Linear, row: int) -> tuple[Tensor, Tensor]:
    part = slice(row * linear.in_features, (row + 1) * linear.in_features)
    return linear.weight[part], linear.bias[part]


@torch.no_grad()
def scale_input(place: NormFold, d_C: Tensor) -> None:
    """Multiply the channels of a normed input by d > 0."""
    for row in (place.scale_row, place.shift_row):
        weight, bias = _rows(place.ada, row)
        weight *= d_C.unsqueeze(1)
        bias *= d_C
    _rows(place.ada, place.scale_row)[1].add_(d_C - 1)
    place.consumer.weight.div_(d_C)


@torch.no_grad()
def shift_input(place: NormFold, offset_C: Tensor) -> None:
    """Add a constant vector to a normed input and take what it is worth out of the bias."""
    gained = place.consumer.weight @ offset_C
    _rows(place.ada, place.shift_row)[1].add_(offset_C)
    for bias, part in zip(place.biases, gained.chunk(len(place.biases)), strict=True):
        bias -= part


@torch.no_grad()
def scale_values(place: ValueFold, d_C: Tensor) -> None:
    """Multiply the channels of v by d > 0 and divide the columns of proj by it."""
    place.source.weight[place.rows].mul_(d_C.unsqueeze(1))
    place.bias.mul_(d_C)
    place.consumer.weight.div_(d_C)
