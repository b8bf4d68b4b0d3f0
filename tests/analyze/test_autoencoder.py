"""What convolutions of the decoder cost: the layer that is made worst stands first."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from pytest import approx

from varptq.analyze.autoencoder import decoder_costs, psnr
from varptq.models.convolutions import ResBlock
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert_autoencoder
from varptq.quant.find import quant_convolutions

W4A4 = QuantConfig.preset("w4a4")


def test_psnr_is_that_of_its_definition() -> None:
    zeros = torch.zeros(1, 3, 2, 2)
    assert psnr(zeros, zeros) is None
    assert psnr(zeros, zeros + 0.2) == approx(20.0, abs=1e-5)


def test_the_worst_layer_stands_first_and_the_model_is_left(
    make_tiny: Callable[..., Pipeline],
) -> None:
    vae = make_tiny().vae
    # A weight that nothing is multiplied with takes all steps of its output channel.
    block = cast(ResBlock, vae.get_submodule("decoder.up.0.block.0"))
    block.norm2.weight[0] = block.norm2.bias[0] = 0.0
    block.conv2.weight[:, 0] = 50.0
    before = {name: id(module) for name, module in vae.named_modules()}
    tokens = torch.randint(32, (2, 14), generator=torch.Generator().manual_seed(0))
    found = decoder_costs(vae, W4A4, tokens)
    assert {name: id(module) for name, module in vae.named_modules()} == before
    layers = quant_convolutions(convert_autoencoder(vae, W4A4))
    rows = found["layers"]
    assert {row["layer"] for row in rows} == {n for n in layers if n.startswith("decoder.")}
    assert rows[0]["layer"] == "decoder.up.0.block.0.conv2"
    values = [row["psnr"] for row in rows]
    assert values == sorted(values) and found["psnr"] < values[0] + 3


def test_a_float_decoder_has_no_rows(tiny: Pipeline) -> None:
    found = decoder_costs(
        tiny.vae, QuantConfig.preset("w4a4+paper"), torch.zeros(1, 14, dtype=torch.int64)
    )
    assert found == {"psnr": None, "layers": []}
