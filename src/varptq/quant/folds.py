"""Rewritings of a float transformer that leave its function as it is and change what its quantizers
see: they run before conversion and cost nothing afterwards.

    scale_input     W u = (W / d) (d u),
                    d u = (1 + s') LN(x) + b'  with  s' = d s + d - 1,  b' = d b
    shift_input     W u + a = W (u + o) + (a - W o),  u + o by b' = b + o
    scale_values    P V W^T = (P V d) (W / d)^T
    scale_gain      W u = (W / d) (d u), d into the gain of a norm
    scale_channels  W u = (W / d) (d u), d into the parameters that make u, for all W that read it
    scale_all       all the places of a model, or what of them is in a part of it

Every one is exact in real numbers. They change the model they are given, in place: hand them a
copy. Which d or o is somebody else's question, and where they go the model says (`folds()`).
Shapes: C width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from varptq.models.seams import ChannelFold, Fold, GainFold, NormFold, ValueFold, consumers_of

# (C,) diagonals by the names of the layers that read the same channels.
Diagonals = Mapping[tuple[str, ...], Tensor]


def places(folds: Mapping[str, Fold]) -> dict[tuple[str, ...], Fold]:
    """Every place once, by the names of the layers that read it."""
    names: dict[int, list[str]] = {}
    for name, fold in folds.items():
        names.setdefault(id(fold), []).append(name)
    return {tuple(found): folds[found[0]] for found in names.values()}


def scale_all(
    folds: Mapping[str, Fold],
    diagonals: Diagonals,
    within: tuple[Collection[int], Collection[int]] | None = None,
) -> None:
    """Multiply the channels of all these places. within: ids of the modules and parameters of a
    part; a place that many parts share is scaled part by part, and what it has elsewhere is left
    alone."""
    found = places(folds)
    for names, d_C in diagonals.items():
        place = found[names] if within is None else _within(found[names], *within)
        if place is not None:
            scale(place, d_C)


def _within(place: Fold, modules: Collection[int], parameters: Collection[int]) -> Fold | None:
    """What of a place is in a part. One that is not for many layers is in it or outside of it."""
    if not isinstance(place, ChannelFold):
        return place if id(consumers_of(place)[0]) in modules else None
    consumers = tuple(c for c in place.consumers if id(c) in modules)
    return ChannelFold(consumers, tuple(t for t in place.tensors if id(t) in parameters))


def scale(place: Fold, d_C: Tensor) -> None:
    """Multiply the channels that a place's Linears read by d > 0."""
    match place:
        case NormFold():
            scale_input(place, d_C)
        case ValueFold():
            scale_values(place, d_C)
        case GainFold():
            scale_gain(place, d_C)
        case ChannelFold():
            scale_channels(place, d_C)


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


@torch.no_grad()
def scale_gain(place: GainFold, d_C: Tensor) -> None:
    """Multiply the channels of a modulated norm by d > 0."""
    if place.gain.weight is None:
        place.gain.start(place.like)
    assert place.gain.weight is not None
    place.gain.weight[place.row].mul_(d_C)
    place.consumer.weight.div_(d_C)


@torch.no_grad()
def scale_channels(place: ChannelFold, d_C: Tensor) -> None:
    """Multiply channels by d > 0 in the tensors that make them."""
    for tensor in place.tensors:
        tensor.mul_(d_C.view(-1, *(1,) * (tensor.dim() - 1)))
    for consumer in place.consumers:
        consumer.weight.div_(d_C)
