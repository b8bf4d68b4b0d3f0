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

from varptq.errors import InputError
from varptq.models.scales import Scales

RESIDUAL_RATIO = 0.5
PHI_KERNEL = 3


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


class Phi(nn.Conv2d):
    """phi(h) = 0.5 h + 0.5 conv(h), size preserving."""

    def __init__(self, code_dim: int) -> None:
        super().__init__(
            code_dim, code_dim, PHI_KERNEL, padding=PHI_KERNEL // 2, dtype=torch.float32
        )

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, P, P) -> (B, C, P, P)."""
        return (1 - RESIDUAL_RATIO) * input + RESIDUAL_RATIO * super().forward(input)


class PhiBank(nn.Module):
    """The J phi convolutions, shared by neighbouring scales, under upstream's name `qresi_ls`."""

    def __init__(self, num_phi: int, code_dim: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(code_dim) for _ in range(num_phi))


class TokenPyramid(nn.Module):
    """Codebook and phi convolutions over a schedule of scales; upstream's `quantize.*` names.

    `hit_scales` is the row count of `ema_vocab_hit_SV`, a usage counter of upstream's training kept
    so that a checkpoint loads strictly. It need not be K (one VQVAE serves 256 and 512 px); 0 keeps
    no buffer.
    """

    def __init__(
        self, scales: Scales, codebook_size: int, code_dim: int, num_phi: int, hit_scales: int = 0
    ) -> None:
        super().__init__()
        self.scales = scales
        self.embedding = nn.Embedding(codebook_size, code_dim, dtype=torch.float32)
        self.quant_resi = PhiBank(num_phi, code_dim)
        self.phi_of_scale = phi_index(scales.num_scales, num_phi)
        hits = torch.zeros(hit_scales, codebook_size, dtype=torch.float32) if hit_scales else None
        self.register_buffer("ema_vocab_hit_SV", hits)

    def zeros(self, batch: int) -> Tensor:
        """f_hat before the first scale: (B, C, P, P), dtype and device of the codebook."""
        side = self.scales.last_side
        return self.embedding.weight.new_zeros(batch, self.embedding.embedding_dim, side, side)

    def embed(self, ids: Tensor) -> Tensor:
        """int64 ids of any shape -> codebook rows (..., C)."""
        return self.embedding(ids)

    def contribution(self, h_BlC: Tensor, scale: int) -> Tensor:
        """What the token embeddings (B, l, C) of one scale add to f_hat, (B, C, P, P)."""
        side, last = self.scales.sides[scale], self.scales.last_side
        h_BCPP = h_BlC.transpose(1, 2).unflatten(2, (side, side)).to(self.embedding.weight.dtype)
        if scale != self.scales.num_scales - 1:
            h_BCPP = F.interpolate(h_BCPP, size=(last, last), mode="bicubic", align_corners=False)
        return cast(Tensor, self.quant_resi.qresi_ls[self.phi_of_scale[scale]](h_BCPP))

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        """f_hat (B, C, P, P) with the token embeddings (B, l, C) of `scale` added; a new tensor."""
        return f_hat + self.contribution(h_BlC, scale)

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat after `scale` -> input tokens of the next scale, (B, l_next, C)."""
        side = self.scales.sides[scale + 1]
        return F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2)

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
        for scale, side in enumerate(self.scales.sides):
            is_last = scale == self.scales.num_scales - 1
            z = residual if is_last else F.interpolate(residual, size=(side, side), mode="area")
            ids.append(self.nearest(z.flatten(2).transpose(1, 2)))
            residual = residual - self.contribution(self.embed(ids[-1]), scale)
        return torch.cat(ids, dim=1)

    def accumulate(self, ids_BL: Tensor) -> Tensor:
        """ids (B, L) -> f_hat (B, C, P, P). Ids of the first whole scales give f_hat so far.

        Raises `InputError` for ids that are not integers in [0, V) or do not fill whole scales.
        """
        num_scales = self._whole_scales(ids_BL)
        f_hat = self.zeros(ids_BL.shape[0])
        for scale, part in enumerate(self.scales.slices()[:num_scales]):
            f_hat = self.add_scale(f_hat, self.embed(ids_BL[:, part]), scale)
        return f_hat

    def teacher_inputs(self, ids_BL: Tensor) -> Tensor:
        """ids (B, L) -> the transformer's input tokens of scales 1..K-1, (B, L - l_0, C).

        Raises `InputError` as `accumulate` does, and for fewer than K scales.
        """
        if self._whole_scales(ids_BL) != self.scales.num_scales:
            raise InputError(
                f"token ids cover {ids_BL.shape[1]} tokens: expected all {self.scales.num_tokens}"
            )
        f_hat = self.zeros(ids_BL.shape[0])
        inputs = [f_hat.new_zeros(ids_BL.shape[0], 0, f_hat.shape[1])]
        for scale, part in enumerate(self.scales.slices()[:-1]):
            f_hat = self.add_scale(f_hat, self.embed(ids_BL[:, part]), scale)
            inputs.append(self.next_input(f_hat, scale))
        return torch.cat(inputs, dim=1)

    def _whole_scales(self, ids_BL: Tensor) -> int:
        """Number of scales that the ids fill, after checking shape, dtype and range."""
        if ids_BL.dim() != 2 or ids_BL.shape[1] not in self.scales.ends:
            raise InputError(
                f"token ids have shape {tuple(ids_BL.shape)}: expected (images, tokens), tokens "
                f"one of {self.scales.ends}, whole scales of sides {self.scales.sides}"
            )
        if ids_BL.dtype not in (torch.int64, torch.int32):
            raise InputError(f"token ids are {ids_BL.dtype}: expected torch.int64")
        if ids_BL.numel():
            low, high = int(ids_BL.min()), int(ids_BL.max())
            if low < 0 or high >= self.embedding.num_embeddings:
                raise InputError(
                    f"token ids range over {low}..{high}: "
                    f"expected 0..{self.embedding.num_embeddings - 1}"
                )
        return self.scales.ends.index(ids_BL.shape[1]) + 1
