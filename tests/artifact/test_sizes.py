"""Sizes by kind add up to the file, and four bits are an eighth plus the price of the grid."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from artifact.conftest import tiny_pipeline, tiny_quantized
from varptq.artifact import load, save
from varptq.artifact.sizes import KINDS, KindSize, quantized_size, sizes, total
from varptq.calibrate.quantize import quantize
from varptq.models.pipeline import load_model
from varptq.quant.config import QuantConfig
from varptq.quant.find import quant_linears


@pytest.mark.parametrize(
    "preset", ["w4a4+paper", "w4a4+paper+litevar", "w3a6+paper", "w8a8+paper+released"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kinds_add_up_to_the_file(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    quantized = tiny_quantized(preset, dtype)
    folder = save(quantized, tmp_path / "model")
    stored = load_file(folder / "model.safetensors").values()
    parts = sizes(quantized)
    assert total(parts).bytes == sum(t.numel() * t.element_size() for t in stored)
    document = json.loads((folder / "config.json").read_text())
    assert document["sizes"] == {kind: size.to_dict() for kind, size in parts.items()}
    assert sizes(load(folder, dtype=dtype)) == parts


def test_every_number_of_the_model_counts_once() -> None:
    pipe = tiny_pipeline()
    states = (pipe.var.state_dict(), pipe.vae.state_dict())
    numbers = sum(tensor.numel() for state in states for tensor in state.values())
    assert total(sizes(pipe)).elements == numbers
    assert total(sizes(tiny_quantized())).elements == numbers


def test_a_float_model_has_the_same_kinds_at_full_width() -> None:
    parts = sizes(tiny_pipeline())
    assert list(parts) == [kind for kind in KINDS if kind not in ("shared_ada_lin", "centring")]
    assert list(sizes(tiny_quantized())) == list(parts)
    assert all(parts[kind].bits_per_element == 32 for kind in parts if kind != "float parts")
    half = sizes(tiny_pipeline().to(dtype=torch.bfloat16))
    assert half["fc1"].bits_per_element == 16


def test_what_centring_adds_is_no_number_of_the_float_model() -> None:
    """So that no ratio to the float model gains by it."""
    floats = total(sizes(tiny_pipeline()))
    pipe = tiny_quantized("w4a4+paper+center")
    parts = sizes(pipe)
    linears = quant_linears(pipe.var).values()
    added = sum(m.means.numel() + m.mean_bias.numel() for m in linears if m.centred)
    assert parts["centring"] == KindSize(0, 4 * added) and added
    assert total(parts).elements == floats.elements


def test_the_price_of_the_grid_is_counted() -> None:
    fc1 = sizes(tiny_quantized())["fc1"]
    out, width = 512, 128
    scales, zeros, shape = 4 * out, out // 2, 16
    assert fc1 == KindSize(out * width, out * width // 2 + fc1.grid_bytes, scales + zeros + shape)
    assert math.isclose(fc1.bits_per_element, 4 + 8 * fc1.grid_bytes / (out * width))


def test_what_stays_float_is_counted_as_float() -> None:
    assert sizes(tiny_quantized("w4a4+paper+litevar"))["fc2"].bits_per_element == 32


def test_four_bits_shrink_the_demo_model_to_less_than_a_fifth() -> None:
    quantized = quantize(load_model("demo"), QuantConfig.preset("w4a4+paper"), method="rtn")
    size = quantized_size(quantized)
    assert size.bytes < 0.2 * size.float32_bytes
    assert 4 < size.bits_per_element < 4.5
    assert KindSize().bits_per_element == 0
