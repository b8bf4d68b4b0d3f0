"""The tensors of an artifact: their names, shapes, dtypes and packing. config.json is in schema.py.

A quantized Linear of out x in weights, b bits and G groups a row becomes, in the names and the
layout of compressed-tensors "pack-quantized" (quant/packing.py):

    <layer>.weight_packed       int32 (out, ceil(in * b / 32))   unsigned codes, first one lowest
    <layer>.weight_scale        float32 (out, G)
    <layer>.weight_zero_point   int32 (ceil(out * b / 32), G)    codes too, packed along `out`
    <layer>.weight_shape        int64 (2,)                       out, in

Under the range rule "min_max" a zero point need not be a code; then it is float32 (out, G).
A quantized convolution of an autoencoder (quant/convolution.py) becomes

    <layer>.weight              int8 (O, I, k, k)                codes; or bfloat16, without a scale
    <layer>.weight_scale        float32 (O,)

Everything else keeps the name it has in a checkpoint, and the dtype of the pipeline. Names begin
with "transformer." or "autoencoder.". No file is touched here.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from varptq.models.autoencoder import Autoencoder
from varptq.models.transformer import Transformer
from varptq.quant.config import TensorSpec
from varptq.quant.find import quant_convolutions, quant_linears
from varptq.quant.layers import QuantLinear
from varptq.quant.packing import WORD_BITS, pack, packed_words, unpack

FORMAT_VERSION = 2
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
TRANSFORMER, AUTOENCODER = "transformer.", "autoencoder."
# Entry of the metadata of the weights file that binds it to its config.json.
SEAL = "config_sha256"
PACKED, SCALE, ZERO_POINT, SHAPE = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)
# What a QuantLinear keeps in memory in place of the packed tensors.
UNPACKED = ("codes", "scale", "zero_point")
# Dtypes that a float tensor may have, as safetensors names them.
FLOATS = ("F32", "BF16", "F16", "F64")


class Slot(NamedTuple):
    """Shape and allowed dtypes of a tensor in the file; `dtypes` as safetensors names them."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


def packed_linears(var: Transformer) -> dict[str, QuantLinear]:
    """The layers whose weight is codes, by name (some have a quantized input only)."""
    return {name: m for name, m in quant_linears(var).items() if m.spec.weight is not None}


def slots(var: Transformer, vae: Autoencoder) -> dict[str, Slot]:
    """Every tensor of the artifact of this converted model, which may be on the meta device."""
    expected = {name: _plain_slot(tensor) for name, tensor in plain_tensors(var, vae).items()}
    for layer, linear in packed_linears(var).items():
        for name, slot in linear_slots(linear).items():
            expected[f"{TRANSFORMER}{layer}.{name}"] = slot
    for layer, convolution in quant_convolutions(vae).items():
        weight, scale = f"{AUTOENCODER}{layer}.weight", f"{AUTOENCODER}{layer}.{SCALE}"
        stored = ("BF16",) if convolution.weight_scale is None else ("I8",)
        expected[weight] = expected[weight]._replace(dtypes=stored)
        if convolution.weight_scale is not None:
            expected[scale] = expected[scale]._replace(dtypes=("F32",))
    return expected


def plain_tensors(var: Transformer, vae: Autoencoder) -> dict[str, Tensor]:
    """What is stored as it is: the transformer less its codes and grids, the whole autoencoder."""
    packed = {f"{layer}.{name}" for layer in packed_linears(var) for name in UNPACKED}
    tensors = {TRANSFORMER + k: t for k, t in var.state_dict().items() if k not in packed}
    return tensors | {AUTOENCODER + k: t for k, t in vae.state_dict().items()}


def _plain_slot(tensor: Tensor) -> Slot:
    return Slot(tuple(tensor.shape), FLOATS if tensor.is_floating_point() else ("I64",))


def linear_slots(linear: QuantLinear) -> dict[str, Slot]:
    spec = _weight_spec(linear)
    out, groups = linear.scale.shape
    packed = (out, packed_words(linear.in_features, spec.num_bits))
    zero = Slot((packed_words(out, spec.num_bits), groups), ("I32",))
    if not _zero_is_code(spec):
        zero = Slot((out, groups), ("F32",))
    return {
        PACKED: Slot(packed, ("I32",)),
        SCALE: Slot((out, groups), ("F32",)),
        ZERO_POINT: zero,
        SHAPE: Slot((2,), ("I64",)),
    }


def pack_linear(linear: QuantLinear) -> dict[str, Tensor]:
    """The four tensors of a layer, on the CPU."""
    spec = _weight_spec(linear)
    codes, scale, zero = (cast(Tensor, getattr(linear, name)).cpu() for name in UNPACKED)
    if _zero_is_code(spec):
        zero = pack(zero.to(torch.uint8).t(), spec.num_bits).t()
    return {
        PACKED: pack(codes, spec.num_bits),
        SCALE: scale,
        ZERO_POINT: zero,
        SHAPE: torch.tensor(
            [linear.out_features, linear.in_features], dtype=torch.int64, device="cpu"
        ),
    }


def unpack_linear(linear: QuantLinear, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack_linear`: codes (out, in) uint8, scale and zero_point (out, G) float32,
    in memory of their own.

    stored: tensors that fit `linear_slots(linear)`. Raises ValueError for contents that
    `pack_linear` never writes.
    """
    spec = _weight_spec(linear)
    sizes = [linear.out_features, linear.in_features]
    if stored[SHAPE].tolist() != sizes:
        raise ValueError(f"{SHAPE} is {stored[SHAPE].tolist()}, expected {sizes}")
    scale = stored[SCALE].clone()
    # A codebook gives rows of zeros a scale of 0.
    fits = scale >= 0 if linear.quantizer.table else scale > 0
    if not bool((torch.isfinite(scale) & fits).all()):
        raise ValueError(f"{SCALE} holds values that are not positive numbers")
    zero = stored[ZERO_POINT].clone()
    if _zero_is_code(spec):
        zero = _unpack(zero.t().contiguous(), spec.num_bits, linear.out_features, ZERO_POINT)
        zero = zero.t().float().contiguous()
    elif not bool((torch.isfinite(zero) & (zero == zero.round())).all()):
        raise ValueError(f"{ZERO_POINT} holds values that are not whole numbers")
    codes = _unpack(stored[PACKED], spec.num_bits, linear.in_features, PACKED)
    return dict(zip(UNPACKED, (codes, scale, zero), strict=True))


def _unpack(words: Tensor, num_bits: int, n: int, name: str) -> Tensor:
    used = n * num_bits % WORD_BITS
    # >> keeps the sign, so a negative word has ones in its upper bits, as it must not.
    if used and bool((words[:, -1] >> used).any()):
        raise ValueError(f"{name} has bits set after its last code, expected zeros")
    return unpack(words, num_bits, n)


def _weight_spec(linear: QuantLinear) -> TensorSpec:
    assert linear.spec.weight is not None
    return linear.spec.weight


def _zero_is_code(spec: TensorSpec) -> bool:
    return spec.range_rule != "min_max"
