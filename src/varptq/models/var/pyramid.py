"""The residual token pyramid: K token maps whose upsampled, filtered sum is the image's features.

    f_hat_0 = 0;   f_hat_{k+1} = f_hat_k + phi_k(up(embedding(ids_k)));   phi(h) = (h + conv(h)) / 2
    next input = area_down(f_hat_{k+1}, side of scale k+1)

Encoding runs the same sum greedily: ids_k are the codebook entries nearest to the area-downsampled
residual. The maps between images and features are in `vqvae.py`, the order of token positions in
`scales.py`.

Shapes: B images, L tokens, l tokens of one scale, K scales, C code width, V codebook, P last side.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Pyramid
from varptq.models.scales import Scales
from varptq.models.seams import Phi


def phi_index(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which of the J phi convolutions each of the K scales uses: the tick nearest to i / (K - 1).

    Computed in float64 with numpy's `linspace` as the released models were: for K = 10, J = 4 two
    scales lie exactly between two ticks, and only the same rounding gives 0,0,1,1,1,2,2,3,3,3
    (docs/method.md section 1). A tie goes to the lower tick.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    steps = max(num_scales - 1, 1)
    return tuple(int(np.argmin(np.abs(ticks - i / steps))) for i in range(num_scales))


class PhiBank(nn.Module):
    """The J phi convolutions, shared by neighbouring scales, under upstream's name `qresi_ls`."""

    def __init__(self, num_phi: int, code_dim: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(code_dim) for _ in range(num_phi))


class TokenPyramid(nn.Module, Pyramid):
    """Codebook and phi convolutions over a schedule of scales; upstream's `quantize.*` names.

    `hit_scales` is the row count of `ema_vocab_hit_SV`, a usage counter of upstream's training kept
    so that a checkpoint loads strictly. It need not be K (one VQVAE serves 256 and 512 px); 0 keeps
    no buffer.
    """

    def __init__(
        self, scales: Scales, codebook_size: int, code_dim: int, num_phi: int, hit_scales: int = 0
    ) -> None:
        super().__init__()
        self._scales = scales
        self.embedding = nn.Embedding(codebook_size, code_dim, dtype=torch.float32)
        self.quant_resi = PhiBank(num_phi, code_dim)
        self.phi_of_scale = phi_index(scales.num_scales, num_phi)
        hits = torch.zeros(hit_scales, codebook_size, dtype=torch.float32) if hit_scales else None
        self.register_buffer("ema_vocab_hit_SV", hits)

    @property
    def scales(self) -> Scales:
        return self._scales

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(1, self.embedding.num_embeddings)

    def zeros(self, batch: int) -> Tensor:
        """f_hat before the first scale: (B, C, P, P), dtype and device of the codebook."""
        return self.embedding.weight.new_zeros(
            batch, self.embedding.embedding_dim, *self.scales.last
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 ids of any shape -> codebook rows (..., C)."""
        return self.embedding(tokens)

    def contribution(self, h_BlC: Tensor, scale: int) -> Tensor:
        """What the token embeddings (B, l, C) of one scale add to f_hat, (B, C, P, P)."""
        size, last = self.scales.sides[scale], self.scales.last
        h_BCPP = h_BlC.transpose(1, 2).unflatten(2, size).to(self.embedding.weight.dtype)
        if scale != self.scales.num_scales - 1:
            h_BCPP = F.interpolate(h_BCPP, size=last, mode="bicubic", align_corners=False)
        return cast(Tensor, self.quant_resi.qresi_ls[self.phi_of_scale[scale]](h_BCPP))

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        """f_hat (B, C, P, P) with the token embeddings (B, l, C) of `scale` added; a new tensor."""
        return f_hat + self.contribution(h_BlC, scale)

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat after `scale` -> input tokens of the next scale, (B, l_next, C)."""
        size = self.scales.sides[scale + 1]
        return F.interpolate(f_hat, size=size, mode="area").flatten(2).transpose(1, 2)

    def nearest(self, z_BlC: Tensor) -> Tensor:
        """Index of the codebook entry nearest in squared distance: (B, l, C) -> (B, l) int64."""
        codes_VC = self.embedding.weight.float()
        # |z|^2 is the same for every entry; float32 because bf16 distances tie.
        cross_BlV = z_BlC.float() @ codes_VC.T
        return (codes_VC.square().sum(dim=1) - 2 * cross_BlV).argmin(dim=-1)

    @torch.no_grad()
    def encode(self, features_BCPP: Tensor) -> Tensor:
        """Features (B, C, P, P) -> ids (B, L) int64, greedily from coarse to fine."""
        residual, ids = features_BCPP, []
        for scale, size in enumerate(self.scales.sides):
            is_last = scale == self.scales.num_scales - 1
            z = residual if is_last else F.interpolate(residual, size=size, mode="area")
            ids.append(self.nearest(z.flatten(2).transpose(1, 2)))
            residual = residual - self.contribution(self.embed(ids[-1]), scale)
        return torch.cat(ids, dim=1)
