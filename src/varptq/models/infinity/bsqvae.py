"""The float autoencoder of Infinity: convolutions around a pyramid of bits (Han et al., CVPR 2025).

    encode: images -> encoder -> features -> pyramid -> bits
    decode: bits -> pyramid -> f_hat -> decoder -> clamp to [-1, 1]

Encoder and decoder are those of `convolutions.py` without attention, the pyramid is `pyramid.py`.
Images of any schedule go through the same tensors.

Shapes: B images, H and W their sides, L tokens, d bits of a position, D of a token, P sides of the
features.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from varptq.models import convolutions
from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Autoencoder, checked_images
from varptq.models.convolutions import FEATURES, ConvArch, Decoder, Encoder
from varptq.models.infinity.pyramid import PATCH, BitPyramid
from varptq.models.scales import Scales, Size


@dataclass(frozen=True, kw_only=True)
class BSQVAEArch(ConvArch):
    """What the tensors of a checkpoint say, `code_dim` being d, and what only the bits of the
    transformer say: `patchify`."""

    patchify: bool = False
    """A token is a patch of 2 x 2 positions of the features."""

    @property
    def token_bits(self) -> int:
        """D."""
        return self.code_dim * (PATCH**2 if self.patchify else 1)


class BSQVAE(Autoencoder):
    """Images in [-1, 1] to bits and back. dtype and device are those of the parameters."""

    ENCODING = ("encoder",)
    DECODING = ("decoder",)

    def __init__(self, arch: BSQVAEArch, scales: Scales) -> None:
        super().__init__()
        self.arch, self._scales = arch, scales
        self.encoder, self.decoder = Encoder(arch), Decoder(arch)

    @property
    def pyramid(self) -> BitPyramid:
        arch = self.arch
        return BitPyramid(self._scales, arch.code_dim, arch.patchify, self._like)

    @property
    def scales(self) -> Scales:
        return self._scales

    def over(self, scales: Scales) -> Self:
        found = copy.copy(self)
        found._scales = scales
        return found

    @property
    def alphabet(self) -> Alphabet:
        return self.pyramid.alphabet

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def image_size(self) -> Size:
        """The last grid times the downsampling of the encoder."""
        height, width = self.pyramid.grid(-1)
        return height * self.arch.downsampling, width * self.arch.downsampling

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, d, P, P) before quantization.

        Raises `InputError` for another shape or an integer dtype.
        """
        return self.encoder(
            checked_images(images_B3HW, self.image_size).to(self.encoder.norm_out.weight.dtype)
        )

    @property
    def _like(self) -> Tensor:
        """A tensor on the device and in the dtype of the decoder: quantization leaves norms as they
        are."""
        return self.decoder.norm_out.weight

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> bits (B, L, D) int64. Raises as `features` does."""
        return self.pyramid.encode(self.features(images_B3HW))

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """f_hat (B, d, P, P) -> images (B, 3, H, W), clamped to [-1, 1]."""
        return self.decoder(f_hat.to(self._like.dtype)).clamp(-1, 1)

    def upsamplings(self) -> list[nn.Module]:
        return convolutions.upsamplings(self.decoder)

    def decoder_bytes(self) -> int:
        itemsize = self._like.itemsize
        return FEATURES * math.prod(self.image_size) * self.arch.ch * itemsize

    def zeros(self, batch: int) -> Tensor:
        return self.pyramid.zeros(batch)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.pyramid.embed(tokens)

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        return self.pyramid.add_scale(f_hat, h_BlC, scale)

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        return self.pyramid.next_input(f_hat, scale)
