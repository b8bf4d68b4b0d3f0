"""Published means and covariances of real images' features, in place of the images.

    mu (D,), sigma (D, D)      of pooled features: files of pytorch-fid, MAR, DiT and the ADM suite
    mu_s (S,), sigma_s (S, S)  of spatial features, for sFID: files of the ADM suite
Of the network that made the features they tell only the width. They usually come from more images
than the same file holds, so a distance uses them if they exist.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from varptq.errors import InputError
from varptq.evaluate import npz
from varptq.evaluate.frechet import Gaussian

# Parts of `features.Features` -> the names of their mean and covariance.
NAMES: Mapping[str, tuple[str, str]] = {
    "pooled": ("mu", "sigma"),
    "spatial": ("mu_s", "sigma_s"),
}
# The distances, and the part of the features that each compares.
DISTANCES: Mapping[str, str] = {"fid": "pooled", "sfid": "spatial"}
EXPECTED = "mu (D,) and sigma (D, D) of floats"
# A covariance rounded to float32 differs from its transpose, and has eigenvalues below 0, by less.
ROUNDING = 1e-4


def widths(archive: zipfile.ZipFile) -> dict[str, int]:
    """The parts of which a file has statistics, and D of each, from the headers alone.

    Raises `ValueError` for a mean without its covariance, or shapes that do not belong together.
    """
    found = {}
    for part, pair in NAMES.items():
        there = [name for name in pair if name in npz.names(archive)]
        if len(there) == 1:
            raise ValueError(f"has {there[0]} of {' and '.join(pair)} alone")
        if there:
            mean, covariance = (npz.header(archive, name) for name in pair)
            kinds = {mean.dtype.kind, covariance.dtype.kind}
            fit = len(mean.shape) == 1 and mean.shape * 2 == covariance.shape
            if kinds != {"f"} or not fit or not mean.shape[0]:
                raise ValueError(f"{mean} and {covariance}")
            found[part] = mean.shape[0]
    return found


def load(path: Path, part: str) -> Gaussian:
    """The Gaussian of a part that `widths` found, of an unknown number of images.

    Raises `InputError` for NaN or infinity, and for a matrix that is not a covariance.
    """
    with npz.opened(path, EXPECTED) as archive:
        mean, covariance = (
            torch.from_numpy(npz.array(archive, name).astype("float64")) for name in NAMES[part]
        )
    for name, tensor in zip(NAMES[part], (mean, covariance), strict=True):
        if not tensor.isfinite().all():
            raise InputError(f"images {path}: {name} holds NaN or infinity; take another copy")
    if (wrong := _flaw(covariance)) is not None:
        raise InputError(f"images {path}: {NAMES[part][1]} {wrong}, so it is no covariance")
    return Gaussian.from_moments(mean, (covariance + covariance.T) / 2)


def _flaw(covariance: Tensor) -> str | None:
    """Why a square matrix is not a covariance, None if it is one."""
    lowest, highest = covariance.diagonal().aminmax()
    if lowest < 0:
        return f"has the variance {float(lowest):g}"
    apart = (covariance - covariance.T).abs().max()
    if apart > ROUNDING * highest:
        return f"differs from its transpose by {float(apart):g}"
    # A Cholesky factor exists if no eigenvalue is below minus what is added to all of them.
    shift = torch.eye(len(covariance), dtype=torch.float64, device="cpu") * (
        ROUNDING * covariance.trace()
    )
    if highest > 0 and torch.linalg.cholesky_ex(covariance + shift).info:
        return "has a negative eigenvalue"
    return None
