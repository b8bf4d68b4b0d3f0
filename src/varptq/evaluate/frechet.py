"""The Frechet distance between two sets of features, each taken as a Gaussian.

    d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
With pooled Inception features against real images this is FID, with its spatial features sFID, and
against samples of the float model FID2FP. A set is summed in a stream (n, sum x, sum x x^T in
float64), so no features are kept. The caller chooses the features and the images.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varptq.errors import InputError, NonFiniteError

# An eigenvalue below this share of the largest, times D, counts as a rounded zero.
_ROUNDING = torch.finfo(torch.float64).eps


class Gaussian:
    """Mean and covariance of a stream of features, in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._outer = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, x_ND: Tensor) -> Gaussian:
        """The Gaussian of features (N, D)."""
        gaussian = cls()
        gaussian.update(x_ND)
        return gaussian

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int = 2) -> Gaussian:
        """From a mean (D,) and covariance (D, D), e.g. `mu` and `sigma` of a published npz.

        count: how many features they were computed from, if known; at least 2.
        Raises `InputError` for shapes that do not belong together.
        """
        mean, covariance = mean.double().cpu(), covariance.double().cpu()
        _check_moments(mean, covariance)
        outer = covariance * (count - 1) + count * torch.outer(mean, mean)
        return cls.from_state(
            {
                "count": torch.tensor(count, dtype=torch.int64, device="cpu"),
                "sum": mean * count,
                "outer": outer,
            }
        )

    @property
    def dim(self) -> int:
        """D, or 0 before the first feature."""
        return len(self._sum)

    def update(self, x_ND: Tensor) -> None:
        """Add features (N, D) of any float type and device.

        Raises `InputError` for another D and `NonFiniteError` for NaN or infinity.
        """
        if x_ND.ndim != 2 or (self.count and x_ND.shape[1] != self.dim):
            raise InputError(
                f"features: shape {tuple(x_ND.shape)}, expected (N, {self.dim or 'D'})"
            )
        x_ND = x_ND.detach().double().cpu()
        if not x_ND.isfinite().all():
            raise NonFiniteError("features: hold NaN or infinity; check the images and the network")
        self._grow(x_ND.shape[1])
        self.count += len(x_ND)
        self._sum += x_ND.sum(0)
        self._outer.addmm_(x_ND.T, x_ND)

    def merge(self, other: Gaussian) -> None:
        """Add the sums of `other`. Raises `InputError` for another D."""
        if self.count and other.count and self.dim != other.dim:
            raise InputError(f"features: {self.dim} and {other.dim} dimensions cannot be merged")
        if other.count:
            self._grow(other.dim)
            self.count += other.count
            self._sum += other._sum
            self._outer += other._outer

    @property
    def mean(self) -> Tensor:
        """(D,) float64. Raises `InputError` before the first feature."""
        if self.count < 1:
            raise InputError("features: none, a mean needs at least 1 image")
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by n - 1. Raises `InputError` for fewer than 2 features."""
        if self.count < 2:
            raise InputError(f"features: {self.count}, a covariance needs at least 2 images")
        mean = self.mean
        return (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """All sums, for storage: count () int64, sum (D,) and outer (D, D) float64."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64, device="cpu"),
            "sum": self._sum,
            "outer": self._outer,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Gaussian:
        """The inverse of `state`. Raises `InputError` for shapes that do not belong together."""
        total, outer = state["sum"], state["outer"]
        _check_moments(total, outer)
        gaussian = cls()
        gaussian.count = int(state["count"])
        gaussian._sum, gaussian._outer = total.double().clone(), outer.double().clone()
        return gaussian

    def _grow(self, dim: int) -> None:
        if not self.count:
            self._sum = torch.zeros(dim, dtype=torch.float64, device="cpu")
            self._outer = torch.zeros(dim, dim, dtype=torch.float64, device="cpu")


def _check_moments(first: Tensor, second: Tensor) -> None:
    if first.ndim != 1 or second.shape != (len(first), len(first)):
        raise InputError(
            f"statistics: shapes {tuple(first.shape)} and {tuple(second.shape)}, "
            "expected (D,) and (D, D)"
        )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The distance, at least 0. Each side needs at least 2 features, and more than D
    for a value worth quoting.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2), which stays
    exact where S1 or S2 is singular and a matrix root of the product loses half the digits.
    Raises `InputError` for different D or too few features.
    """
    if a.dim != b.dim:
        raise InputError(f"features: {a.dim} and {b.dim} dimensions, expected the same network")
    first, second = a.covariance, b.covariance
    shared = torch.linalg.svdvals(_root(first).T @ _root(second)).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * shared))


def bias_of_means(*sets: Gaussian) -> float:
    """tr S1 / n1 + tr S2 / n2: what the means of finite sets add to the distance.

    For two sets drawn from one distribution this is the expectation of |m1 - m2|^2; the covariances
    add more, without a closed form.
    """
    return sum(float(one.covariance.trace() / one.count) for one in sets)


def _root(covariance: Tensor) -> Tensor:
    """(D, r) R with R R^T = covariance; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * _ROUNDING * len(values)
    return vectors[:, kept] * values[kept].sqrt()
