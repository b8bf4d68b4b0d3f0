"""The pyramid of bits: K maps of signs whose resized sum is the image's features (Infinity, Han et
al., CVPR 2025; BSQ, Zhao et al. 2024).

    f_hat_0 = 0;   f_hat_{k+1} = f_hat_k + up((2 bits_k - 1) / sqrt(d))
    next input = resized(f_hat_{k+1}, grid of scale k+1)

Every resize is bilinear without antialiasing, up and down. With `patchify` a token is a patch of
2 x 2 positions: its 4 d bits are shuffled into pixels, and inputs back into tokens. Encoding runs
the same sum greedily: bits are the signs of the area-downsampled residual.

Shapes: B images, l tokens of one scale, d bits of a position, C = D of a token, P sides of the
features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Pyramid
from varptq.models.scales import Scales, Size

PATCH = 2


class BitPyramid(Pyramid):
    """The sum over a schedule of token maps; it has no tensors of its own. `like` gives dtype and
    device of f_hat."""

    def __init__(self, scales: Scales, latent_bits: int, patchify: bool, like: Tensor) -> None:
        self._scales, self.like = scales, like
        self.latent_bits, self.patchify = latent_bits, patchify

    @property
    def scales(self) -> Scales:
        return self._scales

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(self.latent_bits * (PATCH**2 if self.patchify else 1), 2)

    def grid(self, scale: int) -> Size:
        """Sides of the features at a scale."""
        height, width = self.scales.sides[scale]
        return (PATCH * height, PATCH * width) if self.patchify else (height, width)

    def zeros(self, batch: int) -> Tensor:
        return self.like.new_zeros(batch, self.latent_bits, *self.grid(-1))

    def embed(self, tokens: Tensor) -> Tensor:
        """Bits (B, l, C) -> (B, l, C): +- 1 / sqrt(d)."""
        return (2 * tokens - 1).to(self.like.dtype) * self.latent_bits**-0.5

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        h_BChw = h_BlC.transpose(1, 2).unflatten(2, self.scales.sides[scale])
        h_Bdhw = F.pixel_shuffle(h_BChw, PATCH) if self.patchify else h_BChw
        return f_hat + _bilinear(h_Bdhw, self.grid(-1))

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        return self._tokens(_bilinear(f_hat, self.grid(scale + 1)))

    def _tokens(self, maps_Bdhw: Tensor) -> Tensor:
        """(B, d, ..) on the grid of a scale -> (B, l, C), row-major."""
        maps = F.pixel_unshuffle(maps_Bdhw, PATCH) if self.patchify else maps_Bdhw
        return maps.flatten(2).transpose(1, 2)

    def residual(self, features_BdPP: Tensor, f_hat: Tensor, scale: int) -> Tensor:
        """What `scale` has to add to f_hat, as tokens (B, l, C) whose signs are its bits."""
        missing = F.interpolate(features_BdPP - f_hat, size=self.grid(scale), mode="area")
        return self._tokens(missing)

    @torch.no_grad()
    def encode(self, features_BdPP: Tensor, flips_BLD: Tensor | None = None) -> Tensor:
        """Features -> bits (B, L, D) int64, greedily from coarse to fine.

        flips: (B, L, D) bool, bits of which the other one goes into the sum, so that the finer
        scales answer its mistakes (the paper's self-correction); those returned are not flipped.
        """
        f_hat, bits = torch.zeros_like(features_BdPP), []
        for scale, part in enumerate(self.scales.slices()):
            bits.append((self.residual(features_BdPP, f_hat, scale) > 0).long())
            added = bits[-1] if flips_BLD is None else bits[-1] ^ flips_BLD[:, part].long()
            f_hat = self.add_scale(f_hat, self.embed(added), scale)
        return torch.cat(bits, dim=1)


def _bilinear(maps_Bdhw: Tensor, size: Size) -> Tensor:
    """The same where the sides fit already, so the last scale stays as it is."""
    if tuple(maps_Bdhw.shape[-2:]) == size:
        return maps_Bdhw
    return F.interpolate(maps_Bdhw, size=size, mode="bilinear", align_corners=False)
