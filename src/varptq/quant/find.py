"""Finding the quantized modules of a converted model, and setting what all of them share."""

from __future__ import annotations

from torch import nn

from varptq.quant.attention import QuantMix
from varptq.quant.convolution import QuantConvolution
from varptq.quant.layers import QuantLinear


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Quantized Linear layers by full name."""
    return {m.layer: m for m in model.modules() if isinstance(m, QuantLinear)}


def quant_convolutions(model: nn.Module) -> dict[str, QuantConvolution]:
    """Quantized convolutions by full name."""
    return {m.layer: m for m in model.modules() if isinstance(m, QuantConvolution)}


def quant_mixes(model: nn.Module) -> list[QuantMix]:
    """Attention-value products in block order."""
    return [m for m in model.modules() if isinstance(m, QuantMix)]


def set_theta(model: nn.Module, theta: float | None) -> None:
    """One threshold for the whole model; None switches shift-and-sum off, as no order above 0 does
    for a layer."""
    for mix in quant_mixes(model):
        mix.theta = theta if mix.spec.max_order else None


def release_float_weights(model: nn.Module) -> None:
    for linear in quant_linears(model).values():
        linear.drop_float_weight()
