"""The slow path of runtime "cpu": torch's own int8 product between the passes of "reference".

    P' = P - za W1 - zw (A1 - L za),   P = sum a w of unsigned codes a and stored weights w in int8

W1 and A1 are the sums of w and of a over a segment of L channels. `torch._int_mm` gives P where it
is exact on this machine: without VNNI a library may add pairs in 16 bits and saturate, so two
matrices of extreme codes are tried once. Otherwise torch multiplies in int32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varptq.runtime.cpu import refuse_attention, refuse_linear
from varptq.runtime.kernels import AttentionRule, InputRule, Weight
from varptq.runtime.reference import ReferenceKernels, Rows, segment

PROBE = 128
# int8 times int8 or uint8 times int8 to int32; torch has no public name for it.
_int_mm: Callable[[Tensor, Tensor], Tensor] = getattr(torch, "_int_mm")  # noqa: B009


class StoredWeight(NamedTuple):
    """stored (N, K) int8: codes less their zero points, at 8 bits less 128. scale (N, G) float32,
    zero_point (N, G) int32: what is still to be subtracted from what is stored."""

    stored: Tensor
    scale: Tensor
    zero_point: Tensor


class TorchKernels(ReferenceKernels):
    """Executes what the native core does, and refuses the rest alike."""

    name = "cpu"

    def refuse_linear(self, rule: InputRule) -> str | None:
        return refuse_linear(rule)

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        return refuse_attention(rule)

    def pack(self, weight: Weight, rule: InputRule) -> Any:
        groups = weight.codes.to(torch.int16).unflatten(1, (weight.scale.shape[1], -1))
        zero_point = weight.zero_point.to(torch.int16)
        offset = torch.full_like(zero_point, 128) if weight.num_bits == 8 else zero_point
        stored = (groups - offset.unsqueeze(-1)).flatten(1).to(torch.int8)
        return StoredWeight(stored, weight.scale, (zero_point - offset).int())

    def products(self, codes: Rows, packed: Any) -> list[Tensor]:
        width, inputs = segment(codes, packed), packed.stored.shape[1]
        row_group, weight_group = (inputs // t.scale.shape[-1] for t in (codes, packed))
        found = []
        for start in range(0, inputs, width):
            a_TMg = codes.codes[..., start : start + width]
            w_Ng = packed.stored[:, start : start + width]
            za_TM1 = codes.zero_point[..., start // row_group, None].int()
            zw_N = packed.zero_point[:, start // weight_group]
            w1_N = w_Ng.sum(dim=1, dtype=torch.int32)
            a1_TM1 = a_TMg.sum(dim=-1, keepdim=True, dtype=torch.int32)
            product = _int8_product(a_TMg.flatten(0, 1), w_Ng).view(*a_TMg.shape[:2], -1)
            found.append(product - za_TM1 * w1_N - zw_N * (a1_TM1 - width * za_TM1))
        return found


def _int8_product(a_Mg: Tensor, w_Ng: Tensor) -> Tensor:
    """uint8 a times the transpose of int8 w, int32 (M, N)."""
    if _int_mm_is_exact():
        return _int_mm(a_Mg.contiguous(), w_Ng.contiguous().T)
    return a_Mg.int() @ w_Ng.int().T


@functools.cache
def _int_mm_is_exact() -> bool:
    a = torch.full((PROBE, PROBE), 255, dtype=torch.uint8)
    a[::2, ::2] = 1
    w = torch.full((PROBE, PROBE), 127, dtype=torch.int8)
    w[1::2] = -128
    try:
        return torch.equal(_int_mm(a, w.T), a.int() @ w.int().T)
    except RuntimeError:
        # This version of torch has no unsigned codes on the left.
        return False
