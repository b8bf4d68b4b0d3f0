"""Transforms of a Linear's input, centring per scale and a block Hadamard rotation.

    y = W x + b  =  (W R) (R^T (x - m_k)) + (b + W m_k)        R orthogonal, m_k the mean at scale k

Both identities are exact for any m and any orthogonal R. The weight side (W R, and one row of bias
per scale, made with the float W) is folded in once; the input side runs before the activation
quantizer. R = block_diag(S H_n / sqrt(n)), S fixed signs, H_n the Hadamard matrix in natural order.

Why: an activation quantizer's error grows with the range of its group. A mean that every token
shares costs range and carries nothing; a rotation spreads what sticks out over its block.
Shapes: K scales, n block size; x (..., in).
"""

from __future__ import annotations

import torch
from torch import Tensor


def transformed(x: Tensor, mean: Tensor | None, block: int | None) -> Tensor:
    """R^T (x - mean) in the dtype of x (..., in); `mean` float32 broadcasts to x. None leaves a
    step out."""
    if mean is not None:
        x = (x - mean).to(x.dtype)
    return hadamard(x, block) if block else x


def signs(size: int, device: torch.device | None = None) -> Tensor:
    """(size,) float32 of +1 and -1: bit 16 of the position times 2^32 over the golden ratio."""
    position = torch.arange(size, dtype=torch.int64, device=device)
    return 1.0 - 2.0 * ((position * 0x9E3779B1) >> 16 & 1).float()


def hadamard(x: Tensor, block: int) -> Tensor:
    """x R on the last axis in blocks of `block`, a power of two: same shape and dtype.

    Defined to the bit: signs, then butterflies of stride 1, 2, 4, ..., block / 2 (sum first,
    difference second), then one multiplication by float32 block^-0.5, all in float32 (float64 for
    float64 input).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide.unflatten(-1, (-1, block)) * signs(block, x.device)
    # Two buffers that take turns, since new tensors cost more than the sums; autograd allows none,
    # and a compiler, which allows none that are cut, needs none.
    spare = None if y.requires_grad or torch.compiler.is_compiling() else torch.empty_like(y)
    stride = 1
    while stride < block:
        first, second = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
        if spare is None:
            y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        else:
            sums, differences = spare.unflatten(-1, (-1, 2, stride)).unbind(-2)
            torch.add(first, second, out=sums)
            torch.sub(first, second, out=differences)
            y, spare = spare, y
        stride *= 2
    return (y * block**-0.5).flatten(-2).to(x.dtype)


def rotate_weight(weight: Tensor, block: int) -> Tensor:
    """W R (out, in), computed in float64 and rounded once: what meets inputs rotated by R."""
    return hadamard(weight.double(), block).to(weight.dtype)


def centred_bias(weight: Tensor, means_Ki: Tensor) -> Tensor:
    """(K, out) float32: W m_k in float64, what the bias of scale k gains."""
    return (means_Ki.double() @ weight.double().T).float()
