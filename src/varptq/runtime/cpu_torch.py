"""The slow path of runtime "cpu": torch's own int8 product between the passes of "reference".

    P' = sum of a'(w - zw) = P - zw A1,   P = sum a' w,   a' = a - za,   A1 = sum a'

over a segment of L channels, with stored weights w in int8. Where some a' does not fit int8, the
product takes the unsigned codes instead and P = sum a w - za W1, W1 = sum w. `torch._int_mm`
multiplies where it is exact on this machine: without VNNI a library may add pairs in 16 bits and
saturate, so it is tested once on matrices of extreme codes. Otherwise torch multiplies in int32.
Convolutions are products of patches, P' = sum of q c - z C1, C1 = sum of c, an image at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varptq.models.convolutions import Taps
from varptq.quant.convolution import MapCodes
from varptq.runtime.kernels import AttentionRule, InputRule, Map, Weight
from varptq.runtime.limits import refuse_attention, refuse_linear
from varptq.runtime.reference import ReferenceKernels, Rows
from varptq.runtime.reference_convolution import scaled

PROBE = 128
# int8 times int8 or uint8 times int8 to int32; torch has no public name for it.
_int_mm: Callable[[Tensor, Tensor], Tensor] = getattr(torch, "_int_mm")  # noqa: B009


class StoredWeight(NamedTuple):
    """stored (S, N, L) int8, segment by segment: codes less their zero points, at 8 bits less 128;
    sums (S, N) int32 over a segment. scale (N, G) float32. zero_point (N, G) int32: what remains
    to be subtracted from the stored values, None if nothing."""

    stored: Tensor
    sums: Tensor
    scale: Tensor
    zero_point: Tensor | None


class PackedPatches(NamedTuple):
    """rows (O, k k I) int8, taps before channels; sums (O,) int32 of them; scale (O,) float32."""

    rows: Tensor
    sums: Tensor
    scale: Tensor
    kernel: int


class TorchKernels(ReferenceKernels):
    """Executes the same configs as the native core, and refuses the same."""

    name = "cpu"

    def refuse_linear(self, rule: InputRule) -> str | None:
        return refuse_linear(rule)

    def refuse_attention(self, rule: AttentionRule) -> str | None:
        return refuse_attention(rule)

    def pack(self, weight: Weight, rule: InputRule) -> Any:
        weight = weight.in_bytes()
        groups = weight.codes.to(torch.int16).unflatten(1, (weight.scale.shape[1], -1))
        zero_point = weight.zero_point.to(torch.int16)
        offset = torch.full_like(zero_point, 128) if weight.num_bits == 8 else zero_point
        stored = (groups - offset.unsqueeze(-1)).flatten(1).to(torch.int8)
        width = math.gcd(rule.group or rule.inputs, rule.weight_group or rule.inputs)
        stored = torch.stack(stored.split(width, dim=1))
        rest = (zero_point - offset).int() if weight.num_bits == 8 else None
        return StoredWeight(stored, stored.sum(dim=-1, dtype=torch.int32), weight.scale, rest)

    def products(self, codes: Rows, packed: Any) -> list[Tensor]:
        inputs, width = codes.codes.shape[-1], packed.stored.shape[-1]
        row_group, weight_group = (inputs // t.scale.shape[-1] for t in (codes, packed))
        zero_point_TMG1 = codes.zero_point.to(torch.int16).unsqueeze(-1)
        groups = codes.codes.to(torch.int16).unflatten(-1, (-1, row_group)) - zero_point_TMG1
        centred = groups.flatten(-2)
        folded = bool(centred.min() >= -128) and bool(centred.max() <= 127)
        left = centred.to(torch.int8) if folded else codes.codes
        found = []
        for index, w_Ng in enumerate(packed.stored):
            channels = slice(index * width, (index + 1) * width)
            product = _int8_product(left[..., channels].flatten(0, 1), w_Ng)
            product = product.view(*left.shape[:2], -1)
            if not folded:
                za_TM1 = codes.zero_point[..., channels.start // row_group, None].int()
                product -= za_TM1 * packed.sums[index]
            if packed.zero_point is not None:
                a1_TM1 = centred[..., channels].sum(dim=-1, keepdim=True, dtype=torch.int32)
                product -= packed.zero_point[:, channels.start // weight_group] * a1_TM1
            found.append(product)
        return found

    def pack_convolution(self, weight_OIkk: Tensor, scale_O: Tensor, taps: Taps) -> Any:
        rows = weight_OIkk.permute(0, 2, 3, 1).flatten(1).contiguous()
        sums = rows.sum(dim=1, dtype=torch.int32)
        return PackedPatches(rows, sums, scale_O, weight_OIkk.shape[-1])

    def convolution(
        self, codes: MapCodes, packed: Any, bias_O: Tensor | None, taps: Taps, skip: Tensor | None
    ) -> Map:
        found = []
        for image, zero in zip(codes.codes.split(1), codes.zero_point.tolist(), strict=True):
            patches = _patches(taps.arranged(image.permute(0, 3, 1, 2), zero), taps, packed.kernel)
            product = _int8_product(patches.flatten(3).flatten(0, 2), packed.rows)
            product -= zero * packed.sums
            found.append(product.view(*patches.shape[:3], -1))
        y_NHWO = scaled(torch.cat(found), codes.scale, packed.scale, bias_O)
        return Map(y_NHWO if skip is None else y_NHWO + skip)


def _patches(x_NCHW: Tensor, taps: Taps, kernel: int) -> Tensor:
    """(N, H', W', k, k, C): what each place of the result is made of."""
    patches = x_NCHW.unfold(2, kernel, taps.stride).unfold(3, kernel, taps.stride)
    return patches.permute(0, 2, 3, 4, 5, 1)


def _int8_product(a_Mg: Tensor, w_Ng: Tensor) -> Tensor:
    """a, uint8 or int8, times the transpose of int8 w, int32 (M, N)."""
    # torch reads (N, 1) wrongly where it is transposed: its strides are those of (1, N).
    if _int_mm_is_exact() and a_Mg.shape[1] > 1:
        return _int_mm(a_Mg.contiguous(), w_Ng.T)
    return a_Mg.int() @ w_Ng.int().T


@functools.cache
def _int_mm_is_exact() -> bool:
    unsigned = torch.full((PROBE, PROBE), 255, dtype=torch.uint8, device="cpu")
    unsigned[::2, ::2] = 1
    signed = torch.full((PROBE, PROBE), 127, dtype=torch.int8, device="cpu")
    signed[1::2] = -128
    try:
        return all(
            torch.equal(_int_mm(a, signed.T), a.int() @ signed.int().T) for a in (unsigned, signed)
        )
    except RuntimeError:
        # This version of torch has no unsigned codes on the left.
        return False
