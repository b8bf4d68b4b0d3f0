"""Rewritings of a float transformer that leave its function as it is and change what its quantizers
see: they run before conversion and cost nothing afterwards.

    scale_input     W u = (W / d) (d u),
                    d u = (1 + s') LN(x) + b'  with  s' = d s + d - 1,  b' = d b
    shift_input     W u + a = W (u + o) + (a - W o),  u + o by b' = b + o
    scale_values    P V W^T = (P V d) (W / d)^T

Every one is exact in real numbers. They change the model they are given, in place: hand them a
copy. Which d or o is somebody else's question. An AdaLN layer shared between blocks (VAR-d36)
has no rows of its own to scale; such blocks have no normed inputs here. Shapes: C width.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from varptq.models.var import VAR, Attention, Block, TokenLinear, VARArch


class NormedInput(NamedTuple):
    """A Linear whose input an AdaLN layer scales and shifts: `ada` holds C rows for each vector, of
    which `scale_row` and `shift_row` count. `biases` add to the output, in order of its rows."""

    consumer: TokenLinear
    ada: nn.Linear
    scale_row: int
    shift_row: int
    biases: tuple[Tensor, ...]


def attentions(var: VAR) -> dict[str, Attention]:
    """Attention modules by name."""
    return {n: m for n, m in var.named_modules() if isinstance(m, Attention)}


def normed_inputs(var: VAR) -> dict[str, NormedInput]:
    """Every Linear behind an AdaLN layer of its own, by name: mat_qkv, fc1 and the head."""
    found: dict[str, NormedInput] = {}
    for index, block in enumerate(cast(Block, block) for block in var.blocks):
        if var.arch.shared_adaln:
            continue
        ada, attention, fc1 = cast(nn.Linear, block.ada_lin[1]), block.attn, block.ffn.fc1
        biases = (attention.q_bias, cast(Tensor, attention.zero_k_bias), attention.v_bias)
        # Vectors of a block: gamma1, gamma2, scale1, scale2, shift1, shift2.
        found[f"blocks.{index}.attn.mat_qkv"] = NormedInput(attention.mat_qkv, ada, 2, 4, biases)
        found[f"blocks.{index}.ffn.fc1"] = NormedInput(fc1, ada, 3, 5, (fc1.bias,))
    ada = cast(nn.Linear, var.head_nm.ada_lin[1])
    found["head"] = NormedInput(var.head, ada, 0, 1, (var.head.bias,))
    return found


def foldable_inputs(arch: VARArch) -> list[str]:
    """Names of the Linears whose input a diagonal can be folded into what makes it, whatever
    stands in their places."""
    found: list[str] = []
    for index in range(arch.depth):
        normed = ("attn.mat_qkv", "ffn.fc1") if not arch.shared_adaln else ()
        found += [f"blocks.{index}.{name}" for name in (*normed, "attn.proj")]
    return [*found, "head"]


def _rows(linear: nn.Linear, row: int) -> tuple[Tensor, Tensor]:
    part = slice(row * linear.in_features, (row + 1) * linear.in_features)
    return linear.weight[part], linear.bias[part]


@torch.no_grad()
def scale_input(place: NormedInput, d_C: Tensor) -> None:
    """Multiply the channels of a normed input by d > 0."""
    for row in (place.scale_row, place.shift_row):
        weight, bias = _rows(place.ada, row)
        weight *= d_C.unsqueeze(1)
        bias *= d_C
    _rows(place.ada, place.scale_row)[1].add_(d_C - 1)
    place.consumer.weight.div_(d_C)


@torch.no_grad()
def shift_input(place: NormedInput, offset_C: Tensor) -> None:
    """Add a constant vector to a normed input and take what it is worth out of the bias."""
    gained = place.consumer.weight @ offset_C
    _rows(place.ada, place.shift_row)[1].add_(offset_C)
    for bias, part in zip(place.biases, gained.chunk(len(place.biases)), strict=True):
        bias -= part


@torch.no_grad()
def scale_values(attention: Attention, d_C: Tensor) -> None:
    """Multiply the channels of v by d > 0 and divide the columns of proj by it."""
    attention.mat_qkv.weight.chunk(3)[2].mul_(d_C.unsqueeze(1))
    attention.v_bias.mul_(d_C)
    attention.proj.weight.div_(d_C)
