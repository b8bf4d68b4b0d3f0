"""Which convolution of the image decoder costs what: the error of images where it alone is
quantized as in a config, and where all are.

PSNR in decibels over the range of the images, [-1, 1], between decoded tokens; None where nothing
differs. Nothing is rounded to pixels, since one layer alone moves hardly any of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from varptq.models.autoencoder import Autoencoder
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert_autoencoder, shared_copy
from varptq.quant.find import quant_convolutions

RANGE = 2.0


@torch.no_grad()
def decoder_costs(vae: Autoencoder, config: QuantConfig, tokens: Tensor) -> dict[str, Any]:
    """{"psnr": of the config, "layers": [{"layer", "precision", "psnr"}, ..]}, the costliest first;
    no layers where all stay float32. `tokens` of all images are decoded once per layer. Raises
    `ConfigError` as `convert_autoencoder` does."""
    quantized, alone = convert_autoencoder(vae, config), shared_copy(vae)
    exact = vae.decode(tokens)
    decoding = tuple(f"{name}." for name in vae.DECODING)
    found: list[dict[str, Any]] = []
    for layer, convolution in quant_convolutions(quantized).items():
        if layer.startswith(decoding):
            parent, _, child = layer.rpartition(".")
            owner = alone.get_submodule(parent)
            before = getattr(owner, child)
            setattr(owner, child, convolution)
            distance = psnr(exact, alone.decode(tokens))
            setattr(owner, child, before)
            found.append({"layer": layer, "precision": convolution.precision, "psnr": distance})
    found.sort(key=lambda row: math.inf if row["psnr"] is None else row["psnr"])
    return {"psnr": psnr(exact, quantized.decode(tokens)), "layers": found}


def psnr(left: Tensor, right: Tensor) -> float | None:
    """Of two batches of images in [-1, 1]."""
    error = float((left - right).double().square().mean())
    return 10 * math.log10(RANGE**2 / error) if error else None
