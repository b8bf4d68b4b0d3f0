"""The decoder of runtime cpu on the native convolutions: that of the reference runtime to the bit,
whatever the batch, the sides and the instruction set."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from varptq.errors import NonFiniteError
from varptq.models.convolutions import (
    FEATURES,
    ConvArch,
    Convolution,
    Decoder,
    Encoder,
    Taps,
    convolutions_of,
    randomize,
)
from varptq.native import binding
from varptq.quant.convolution import QuantConvolution
from varptq.runtime.convolutions import IntConvolution, decode_on
from varptq.runtime.cpu import NativeKernels
from varptq.runtime.kernels import ImageKernels
from varptq.runtime.layers import replace_module
from varptq.runtime.reference import ReferenceKernels

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason()),
]

ARCH = ConvArch(
    ch=24, ch_mult=(1, 1, 3), num_res_blocks=1, code_dim=5, attn_levels=(2,), mid_attn=True
)
SIDES = ((1, 1), (3, 5), (7, 2))


class Network(nn.Module):
    """The parts of an autoencoder that `decode_on` asks for."""

    DECODING = ("decoder",)

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder


def quantized(network: nn.Module) -> Network:
    """`network` with codes in every convolution."""
    randomize(network, torch.Generator().manual_seed(0))
    found = Network(network.eval())
    for name, conv in convolutions_of(found).items():
        replace_module(found, name, QuantConvolution(conv, "int8", name))
    return found


def on(network: Network, kernels: ReferenceKernels | NativeKernels) -> nn.Module:
    found = copy.deepcopy(network)
    decode_on(found, kernels)  # pyright: ignore[reportArgumentType]
    return found.decoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def maps(count: int, channels: int, side: tuple[int, int]) -> Tensor:
    g = torch.Generator().manual_seed(side[1])
    return torch.randn(count, channels, *side, generator=g)


@pytest.fixture
def decoder() -> Iterator[Network]:
    before = binding.isa()
    with torch.inference_mode():
        yield quantized(Decoder(ARCH))
    binding.select_isa(before)


@pytest.mark.parametrize("side", SIDES)
def test_decoded_images_are_those_of_the_reference_to_the_bit(
    decoder: Network, side: tuple[int, int]
) -> None:
    kernels = NativeKernels()
    native, plain = on(decoder, kernels), on(decoder, ReferenceKernels())
    assert isinstance(kernels, ImageKernels)
    assert sum(isinstance(m, IntConvolution) for m in native.modules()) > 20
    z = maps(2, ARCH.code_dim, side)
    want = torch.cat([plain(part) for part in z.split(1)])
    for name in binding.features():
        binding.select_isa(name)
        assert torch.equal(native(z), want), name
    assert torch.cat([native(part) for part in z.split(1)]).equal(want), "the batch shows"


def test_an_encoder_downsamples_on_integers_as_the_reference_does(decoder: Network) -> None:
    encoder = quantized(Encoder(ARCH))
    images = maps(1, 3, (12, 20))
    native, plain = on(encoder, NativeKernels()), on(encoder, ReferenceKernels())
    assert torch.equal(native(images), plain(images))


def test_moments_of_the_producer_are_those_of_its_map(decoder: Network) -> None:
    """A norm with the moments that came with a map codes as one that reads the map itself."""
    native = on(decoder, NativeKernels())
    z = maps(1, ARCH.code_dim, (3, 5))
    want = native(z)
    for module in native.modules():
        if isinstance(module, IntConvolution):
            module.register_forward_hook(lambda _m, _i, y: y.clone())
    assert torch.equal(native(z), want)


@pytest.mark.slow
def test_memory_of_maps_serves_the_next_image(decoder: Network) -> None:
    """After a few images no more is taken, and never more than a decoder is said to need."""
    kernels = NativeKernels()
    native, side = on(decoder, kernels), (64, 64)
    taken: list[int] = []
    for _ in range(5):
        image = native(maps(1, ARCH.code_dim, side))
        taken.append(kernels._room.nbytes)
    widest = ARCH.ch * image.shape[-1] * image.shape[-2] * image.itemsize
    assert 0 < taken[-1] == taken[-2] <= FEATURES * widest


def test_a_map_that_is_not_finite_names_its_layer(decoder: Network) -> None:
    z = maps(1, ARCH.code_dim, (3, 5))
    z[0, 0, 1, 1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layer decoder\.conv_in: input holds NaN"):
        on(decoder, NativeKernels())(z)


def test_a_kernel_beyond_the_native_ones_is_computed_in_float(decoder: Network) -> None:
    wide = Convolution(3, 4, 5, Taps(pads=(2, 2, 2, 2)))
    native = on(quantized(nn.Sequential(wide)), NativeKernels())
    assert not any(isinstance(m, IntConvolution) for m in native.modules())
    assert native(maps(1, 3, (6, 7))).shape == (1, 4, 6, 7)
