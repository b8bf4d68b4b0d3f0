"""One pass over the samples of two models: how alike the images of equal seeds are, and which
tokens were drawn.

    PSNR from the mean error over all images; SSIM, LPIPS, CLIP and agreement are means over images
Only sums are kept, which add up over parts of the images. The measures themselves are in paired.py,
lpips.py and clip.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varptq.evaluate.networks.clip import ClipEncoder, clip_score
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.paired import psnr, ssim
from varptq.evaluate.sampling import Shard
from varptq.models.scales import Scales
from varptq.pictures import Pixels
from varptq.work import Piece


@dataclass
class Tally:
    """Sums over one set of samples, `counts_V` of its tokens and `clip` of its scores."""

    counts_V: Tensor
    images: int = 0
    clip: float = 0.0

    def pack(self) -> Piece:
        return Piece({"counts": self.counts_V}, {"images": self.images, "clip": self.clip})

    def merge(self, piece: Piece) -> None:
        """Add sums that another object packed."""
        self.counts_V += piece.tensors["counts"]
        self.images += piece.facts["images"]
        self.clip += piece.facts["clip"]

    def add(self, shard: Shard, prompts: Sequence[str], encoder: ClipEncoder | None) -> None:
        self.images += len(shard.images)
        ids = torch.from_numpy(shard.tokens).flatten()
        self.counts_V += torch.bincount(ids, minlength=len(self.counts_V))
        if encoder is not None:
            texts = [prompts[int(label)] for label in shard.labels]
            self.clip += float(clip_score(_tensor(shard.images), texts, encoder).double().sum())


@dataclass
class PairSums:
    """Sums over pairs of images for the metrics in `wanted`."""

    scales: Scales
    wanted: Collection[str]
    lpips: Lpips | None = None
    images: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    equal_L: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.equal_L = torch.zeros(self.scales.num_tokens, dtype=torch.float64, device="cpu")

    def pack(self) -> Piece:
        return Piece({"equal": self.equal_L}, {"images": self.images, "sums": self.sums})

    def merge(self, piece: Piece) -> None:
        """Add sums that another object packed."""
        self.equal_L += piece.tensors["equal"]
        self.images += piece.facts["images"]
        for name, value in piece.facts["sums"].items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def add(self, first: Shard, second: Shard) -> None:
        self.images += len(first.images)
        equal = torch.from_numpy(first.tokens == second.tokens).double()
        if equal.dim() == 3:  # of a token of several draws, the share that is equal
            equal = equal.mean(-1)
        self.equal_L += equal.sum(0)
        for name, value in self._means(first.images, second.images).items():
            self.sums[name] = self.sums.get(name, 0.0) + value * len(first.images)

    def _means(self, first: Pixels, second: Pixels) -> dict[str, float]:
        """Means over these images; for PSNR the mean squared error divided by the squared peak."""
        means: dict[str, float] = {}
        if "psnr" in self.wanted:
            means["psnr"] = 10 ** (-psnr(first, second) / 10)
        if "ssim" in self.wanted:
            means["ssim"] = ssim(first, second)
        if "lpips" in self.wanted:
            assert self.lpips is not None
            means["lpips"] = float(self.lpips(_tensor(first), _tensor(second)).double().mean())
        return means

    def results(self) -> dict[str, float | None]:
        """Results by name; PSNR is None if all images are equal, as JSON has no infinity."""
        found: dict[str, float | None] = {k: v / self.images for k, v in self.sums.items()}
        if (noise := found.get("psnr")) is not None:
            found["psnr"] = -10 * math.log10(noise) if noise else None
        if "token_agreement" in self.wanted:
            found["token_agreement"] = float(self.equal_L.mean() / self.images)
        return found

    def agreement_per_scale(self) -> list[float]:
        """Share of equal tokens at each scale, coarse to fine."""
        return [float(self.equal_L[part].mean() / self.images) for part in self.scales.slices()]


def codebook_use(counts_V: Tensor, float_counts_V: Tensor | None = None) -> dict[str, Any]:
    """Counts of both models and the L1 distance of their frequencies, as plain values."""
    use: dict[str, Any] = {"counts": counts_V.tolist()}
    if float_counts_V is not None:
        shares = [c.double() / c.sum() for c in (counts_V, float_counts_V)]
        use["float_counts"] = float_counts_V.tolist()
        use["distance"] = float((shares[0] - shares[1]).abs().sum())
    return use


def _tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels))
