"""The float VQVAE: images to feature maps and back, of the VQGAN f16 kind.

    encode: images -> encoder -> quant_conv -> features -> token pyramid -> ids
    decode: ids -> token pyramid -> f_hat -> post_quant_conv -> decoder -> clamp to [-1, 1]

Encoder and decoder are those of `convolutions.py`.

Shapes: B images, H and W their sides, L tokens, C channels, P side of the feature map and the
last token map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from varptq.models import convolutions
from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Autoencoder, checked_images
from varptq.models.convolutions import FEATURES, ConvArch, Decoder, Encoder
from varptq.models.scales import Scales, Size
from varptq.models.var.pyramid import TokenPyramid


@dataclass(frozen=True, kw_only=True)
class VQVAEArch(ConvArch):
    """Everything the tensors of a checkpoint say about the VQVAE (docs/method.md section 1);
    `code_dim` is Cvae, the width of a codebook entry."""

    codebook_size: int
    """V."""
    num_phi: int
    """J, phi convolutions of the token pyramid."""
    quant_kernel: int = 3
    """Kernel side of quant_conv and post_quant_conv."""
    hit_scales: int = 0
    """Rows of the bookkeeping buffer `ema_vocab_hit_SV`; 0 where the file has none."""


class VQVAE(Autoencoder):
    """Images in [-1, 1] to token ids and back. dtype and device are those of the parameters."""

    ENCODING = ("encoder", "quant_conv")
    DECODING = ("post_quant_conv", "decoder")

    def __init__(self, arch: VQVAEArch, scales: Scales) -> None:
        super().__init__()
        self.arch = arch
        self.encoder, self.decoder = Encoder(arch), Decoder(arch)
        self.quantize = TokenPyramid(
            scales, arch.codebook_size, arch.code_dim, arch.num_phi, arch.hit_scales
        )
        kernel, dim = arch.quant_kernel, arch.code_dim
        self.quant_conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, dtype=torch.float32)
        self.post_quant_conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, dtype=torch.float32)

    @property
    def scales(self) -> Scales:
        return self.quantize.scales

    @property
    def alphabet(self) -> Alphabet:
        return self.quantize.alphabet

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    @property
    def image_size(self) -> Size:
        """The last map times the downsampling of the encoder."""
        height, width = self.scales.last
        return height * self.arch.downsampling, width * self.arch.downsampling

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, Cvae, P, P) before quantization.

        Raises `InputError` for another shape or an integer dtype.
        """
        images_B3HW = checked_images(images_B3HW, self.image_size)
        return self.quant_conv(self.encoder(images_B3HW.to(self.quant_conv.weight.dtype)))

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> ids (B, L) int64. Raises as `features` does."""
        return self.quantize.encode(self.features(images_B3HW))

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """f_hat (B, Cvae, P, P) -> images (B, 3, H, W), clamped to [-1, 1]."""
        # The decoder may have been cast by itself.
        z_BCPP = f_hat.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z_BCPP)).clamp(-1, 1)

    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    def upsamplings(self) -> list[nn.Module]:
        return convolutions.upsamplings(self.decoder)

    def decoder_bytes(self) -> int:
        itemsize = self.quantize.embedding.weight.itemsize
        return FEATURES * math.prod(self.image_size) * self.arch.ch * itemsize

    def zeros(self, batch: int) -> Tensor:
        return self.quantize.zeros(batch)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.quantize.embed(tokens)

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        return self.quantize.add_scale(f_hat, h_BlC, scale)

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        return self.quantize.next_input(f_hat, scale)

    def randomize(self, generator: torch.Generator) -> None:
        """Fill the parameters with a fresh model's values (for benchmarks and tests)."""
        convolutions.randomize(self, generator)
