"""Precision and recall of a set of images: how realistic it is, and how well it covers real images.

    ball of a point = everything as near to it as its k-th neighbour in its own set
    precision = share of fakes inside the ball of some real image; recall = the other way round
Kynkaanniemi et al. 2019, with k = 3 as in the ADM suite, by brute force in blocks of rows. The
caller chooses the features; the suite takes pooled Inception features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from varptq.errors import InputError, NonFiniteError

# Distances held at once: 128 MB in float64.
BLOCK_ELEMENTS = 1 << 24
# Rounding gives equal points a distance, and equal distances a difference, which stay below this
# share of the squared norms.
ROUNDING = 1e-13


def precision_recall(real_ND: Tensor, fake_MD: Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of fake features (M, D) against real ones (N, D).

    Computed in float64 on the device of `real_ND`; time grows with (N + M)^2 D, memory with
    (N + M) D. Raises `InputError` for sets that do not match or have too few rows.
    """
    for name, features in (("real", real_ND), ("fake", fake_MD)):
        if features.ndim != 2 or features.shape[1] != real_ND.shape[-1] or len(features) <= k:
            raise InputError(
                f"{name} features: shape {tuple(features.shape)}, expected more than k = {k} rows "
                f"of {real_ND.shape[-1]}"
            )
        if not features.isfinite().all():
            raise NonFiniteError(f"{name} features: hold NaN or infinity")
    if k < 1:
        raise InputError(f"k {k}: must be at least 1")
    # Centred: distances come from norms and products, which lose digits far from the origin.
    centre = real_ND.double().mean(0)
    real = real_ND.double() - centre
    fake = fake_MD.double().to(real.device) - centre
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    realistic = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, distances, rounding in _distances(real, fake):
        # As near as the neighbour, whose distance was rounded another way.
        distances -= rounding
        realistic |= (distances <= real_radii[rows].unsqueeze(1)).any(0)
        covered[rows] = (distances <= fake_radii).any(1)
    return float(realistic.double().mean()), float(covered.double().mean())


def _radii(points: Tensor, k: int) -> Tensor:
    """(N,) squared distance to the k-th neighbour; the nearest point of all is the point itself."""
    nearest = [block.kthvalue(k + 1, dim=1).values for _, block, _ in _distances(points, points)]
    return torch.cat(nearest)


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of the squared distances (len(a), len(b)), and the rounding of each."""
    a_norms, b_norms = a.square().sum(1), b.square().sum(1)
    step = max(1, BLOCK_ELEMENTS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        norms = a_norms[rows].unsqueeze(1) + b_norms
        distances = torch.addmm(norms, a[rows], b.T, alpha=-2)
        rounding = norms.mul_(ROUNDING)
        yield rows, distances.masked_fill_(distances < rounding, 0), rounding
