"""The image decoder on integers: layer by layer, as a whole, and where a runtime has no kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import varptq
from varptq import QuantConfig, artifact, generate
from varptq.calibrate.config import CalibrationConfig
from varptq.errors import ArtifactError, NonFiniteError
from varptq.evaluate.paired import psnr
from varptq.models.convolutions import Convolution, MapNorm, Taps, feeds
from varptq.models.pipeline import Pipeline
from varptq.pictures import to_pixels
from varptq.quant.convert import convert, convert_autoencoder
from varptq.quant.find import quant_convolutions
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime import convolutions
from varptq.runtime.convert import on_integers
from varptq.runtime.convolutions import (
    DeferredMapNorm,
    IntConvolution,
    NormedConvolution,
    decodes_on_integers,
)
from varptq.runtime.cpu_torch import TorchKernels
from varptq.runtime.decoder import decode_in
from varptq.runtime.reference import ReferenceKernels

# Float32 sums of a few hundred terms in two orders, and of a norm before them one code in many.
ROUNDING, MOVED = 2e-5, 0.02
# What 8 bits cost, and what codes that flip at a float's last bit make of that, in decibels.
COSTS, FLIPS = 42, 40


class DecodesInFloat(ReferenceKernels):
    """A runtime that has no convolutions."""

    convolution = None  # pyright: ignore


def quantized(pipe: Pipeline, preset: str) -> QuantizedPipeline:
    """Nearest rounding without calibration."""
    config = QuantConfig.preset(preset)
    var, vae = convert(pipe.var, config), convert_autoencoder(pipe.vae, config)
    return QuantizedPipeline.of(pipe, var, vae, config=config, method="rtn")


@pytest.fixture(scope="module")
def simulated(tiny: Pipeline) -> QuantizedPipeline:
    return quantized(tiny, "w8a8")


def map_of(channels: int, side: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(channels)
    return torch.randn(2, channels, side, side + 1, generator=g) + 0.3


def test_layer_by_layer(simulated: QuantizedPipeline) -> None:
    """Equal maps give equal codes and integers, so outputs differ by float rounding alone."""
    decoder = on_integers(simulated, ReferenceKernels()).vae
    norms, compared = feeds(simulated.vae), 0
    for name, layer in quant_convolutions(simulated.vae).items():
        if not layer.on_codes:
            continue
        other = decoder.get_submodule(name)
        assert isinstance(other, IntConvolution)
        x = map_of(layer.weight.shape[1])
        expected, found = layer(x), other(x)
        tolerance = ROUNDING * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        if name in norms:
            norm, deferred = (v.get_submodule(norms[name]) for v in (simulated.vae, decoder))
            assert isinstance(norm, MapNorm) and isinstance(deferred, DeferredMapNorm)
            expected, found = layer(norm(x)), other(deferred(x))
            assert float((found - expected).abs().max()) < MOVED * float(expected.abs().max())
        compared += 1
    assert compared >= 10


def test_torch_computes_the_same_bits(simulated: QuantizedPipeline) -> None:
    reference, torch_own = (
        on_integers(simulated, k).vae for k in (ReferenceKernels(), TorchKernels())
    )
    compared = 0
    for name, layer in quant_convolutions(simulated.vae).items():
        if layer.on_codes:
            x = map_of(layer.weight.shape[1])
            both = [vae.get_submodule(name)(x) for vae in (reference, torch_own)]
            assert torch.equal(*both), name
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("side", [(5, 7), (1, 1), (40, 300), (2, 33)])
def test_the_last_convolution_in_parts(
    side: tuple[int, int], silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm and a convolution in float, a few rows at a time, are those of torch."""
    width = side[1]
    monkeypatch.setattr(convolutions, "PART_ELEMENTS", 3 * 32 * width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm, conv = MapNorm(32, silu=silu), Convolution(32, 3, 3, Taps(pads=(1, 1, 1, 1)))
        x_BCHW, skip_BOHW = torch.randn(2, 32, *side), torch.randn(2, 3, *side)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    in_parts = NormedConvolution.of(conv, ReferenceKernels())
    with torch.no_grad():
        found = in_parts(DeferredMapNorm(norm)(x_BCHW), skip_BOHW)
        expected = conv(norm(x_BCHW), skip_BOHW)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=ROUNDING)


def test_the_simulated_pipeline_stays_as_it_is(simulated: QuantizedPipeline) -> None:
    before = {name: id(module) for name, module in simulated.vae.named_modules()}
    found = decode_in(on_integers(simulated, ReferenceKernels()), torch.bfloat16)
    assert {name: id(module) for name, module in simulated.vae.named_modules()} == before
    assert decodes_on_integers(found.vae) and not decodes_on_integers(simulated.vae)
    # What is between integers stays float32, so that codes do not depend on a dtype.
    assert all(p.dtype == torch.float32 for p in found.vae.parameters())


def test_a_runtime_without_kernels_decodes_the_values_in_float(
    simulated: QuantizedPipeline,
) -> None:
    found = on_integers(simulated, DecodesInFloat()).vae
    exact = convert_autoencoder(simulated.vae, simulated.config)
    for layer in quant_convolutions(exact).values():
        layer.on_codes = False
        if layer.layer.startswith("decoder."):
            assert type(found.get_submodule(layer.layer)) is Convolution
        else:
            assert layer.layer in quant_convolutions(found)
    f_hat = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.decode_features(f_hat), exact.decode_features(f_hat))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [ReferenceKernels, TorchKernels, DecodesInFloat])
def test_an_image_does_not_depend_on_its_batch(
    simulated: QuantizedPipeline, kernels: type[ReferenceKernels]
) -> None:
    pipe = on_integers(simulated, kernels())
    together = generate(pipe, [0, 3, 1], seed=5, batch_size=3).images
    alone = generate(pipe, [0, 3, 1], seed=5, batch_size=1).images
    assert together is not None and alone is not None
    assert torch.equal(together, alone)


def test_a_map_without_a_range_is_refused_by_name(simulated: QuantizedPipeline) -> None:
    vae = on_integers(simulated, ReferenceKernels()).vae
    f_hat = torch.full((1, 8, 3, 3), float("nan"))
    with pytest.raises(NonFiniteError, match=r"^layer decoder\.mid\.block_1\.conv1: input holds"):
        vae.decode_features(f_hat)


@pytest.mark.slow
def test_what_eight_bits_cost_the_demo() -> None:
    demo = varptq.load_model("demo")
    tokens = generate(demo, range(8), seed=11, decode=False).tokens
    pipe = quantized(demo, "w8a8")

    def pixels(of: Pipeline) -> object:
        return to_pixels((of.vae.decode(tokens) + 1) / 2)

    exact, ours = pixels(demo), pixels(pipe)
    assert psnr(exact, ours) > COSTS  # pyright: ignore[reportArgumentType]
    integers = pixels(on_integers(pipe, ReferenceKernels()))
    assert psnr(exact, integers) > COSTS  # pyright: ignore[reportArgumentType]
    assert psnr(ours, integers) > FLIPS  # pyright: ignore[reportArgumentType]


def test_the_encoder_stays_on_the_mapped_file(tmp_path: Path, tiny: Pipeline) -> None:
    few = CalibrationConfig(num_samples=2)
    made = varptq.quantize(tiny, QuantConfig.preset("w8a8"), method="rtn", calibration=few)
    folder = artifact.save(made, tmp_path / "model")
    pipe = varptq.load(folder, runtime="reference")
    images = generate(pipe, [1], seed=3).images
    assert images is not None
    assert torch.equal(pipe.vae.encode(images * 2 - 1), made.vae.encode(images * 2 - 1))
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="changed while the model was in use"):
        pipe.vae.encode(images * 2 - 1)
    assert generate(pipe, [1], seed=3).images is not None
