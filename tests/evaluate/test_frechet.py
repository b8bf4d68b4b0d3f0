"""The Frechet distance against scipy's matrix root, and its streamed statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from varptq.errors import InputError, NonFiniteError
from varptq.evaluate.frechet import Gaussian, bias_of_means, frechet_distance

# The two ways to the trace agree to this for well-conditioned covariances of about 1.
TOLERANCE = 1e-6


def features(count: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated positive features with a large common mean, as pooled ReLUs have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) / dim**0.5
    return torch.randn(count, dim, generator=generator) @ mix + 3 * torch.rand(
        dim, generator=generator
    )


def by_scipy(first: Tensor, second: Tensor) -> float:
    a, b = first.double().numpy(), second.double().numpy()
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    shared = np.trace(sqrtm(cov_a @ cov_b)).real
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


@pytest.mark.parametrize("dim", [1, 3, 37, 130])
def test_it_agrees_with_scipys_matrix_root(dim: int) -> None:
    first, second = features(3 * dim + 5, dim, 1), features(2 * dim + 9, dim, 2)
    distance = frechet_distance(Gaussian.of(first), Gaussian.of(second))
    expected = by_scipy(first, second)
    assert expected > 0.01
    assert distance == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


# Between lie variances that rounding of the largest one hides, in any way of computing.
variance = st.just(0.0) | st.floats(1e-3, 100)


@pytest.mark.slow
@given(st.lists(st.tuples(variance, variance), min_size=1, max_size=9))
def test_independent_features_have_a_closed_form(variances: list[tuple[float, float]]) -> None:
    first, second = torch.tensor(variances, dtype=torch.float64).T
    a = Gaussian.from_moments(torch.zeros_like(first), first.diag())
    b = Gaussian.from_moments(torch.ones_like(second), second.diag())
    expected = len(variances) + (first.sqrt() - second.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(200, 37), (5, 37), (2, 1), (3, 130)])
def test_equal_sets_are_at_distance_0(count: int, dim: int) -> None:
    """Also with fewer images than dimensions, where a matrix root of the product goes astray."""
    x = features(count, dim)
    shuffled = x[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    assert frechet_distance(Gaussian.of(x), Gaussian.of(shuffled)) < 1e-9


def test_features_without_variance_are_apart_by_their_means() -> None:
    a, b = Gaussian.of(torch.zeros(4, 3)), Gaussian.of(torch.full((5, 3), 2.0))
    assert frechet_distance(a, b) == 12.0


@pytest.mark.slow
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 1000))
def test_streams_and_merges_see_what_one_pass_sees(sizes: list[int], dim: int, seed: int) -> None:
    x = features(sum(sizes) + 1, dim, seed)
    stream, merged = Gaussian(), Gaussian()
    for part in x.split([1, *sizes]):
        stream.update(part)
        merged.merge(Gaussian.of(part))
    for gaussian in (stream, merged, Gaussian.from_state(stream.state())):
        assert gaussian.count == len(x)
        torch.testing.assert_close(gaussian.mean, x.double().mean(0))
        expected = torch.from_numpy(np.atleast_2d(np.cov(x.double().numpy().T)))
        torch.testing.assert_close(gaussian.covariance, expected, rtol=1e-9, atol=1e-9)


def test_published_moments_come_back() -> None:
    gaussian = Gaussian.of(features(130, 37))
    again = Gaussian.from_moments(gaussian.mean, gaussian.covariance, gaussian.count)
    torch.testing.assert_close(again.covariance, gaussian.covariance, rtol=1e-9, atol=1e-12)
    assert frechet_distance(gaussian, again) < 1e-9
    again.update(torch.zeros(1, 37))
    assert again.count == 131


def test_what_it_reads_is_not_changed_by_what_follows() -> None:
    state = Gaussian.of(features(5, 3)).state()
    before = state["outer"].clone()
    Gaussian.from_state(state).update(torch.ones(2, 3))
    merged = Gaussian()
    first = Gaussian.of(features(5, 3))
    merged.merge(first)
    merged.update(torch.ones(2, 3))
    assert torch.equal(state["outer"], before) and torch.equal(first.state()["outer"], before)


def test_mistakes_are_named() -> None:
    three = Gaussian.of(torch.ones(1, 3))
    with pytest.raises(InputError, match=r"shape \(2, 4\), expected \(N, 3\)"):
        three.update(torch.ones(2, 4))
    with pytest.raises(NonFiniteError, match="NaN"):
        three.update(torch.full((1, 3), torch.nan))
    with pytest.raises(InputError, match=r"1, a covariance needs at least 2"):
        _ = three.covariance
    with pytest.raises(InputError, match=r"none, a mean needs"):
        _ = Gaussian().mean
    with pytest.raises(InputError, match=r"3 and 4 dimensions"):
        three.merge(Gaussian.of(torch.ones(1, 4)))
    with pytest.raises(InputError, match=r"3 and 4 dimensions, expected the same network"):
        frechet_distance(three, Gaussian.of(torch.ones(1, 4)))
    with pytest.raises(InputError, match=r"expected \(D,\) and \(D, D\)"):
        Gaussian.from_moments(torch.ones(3), torch.ones(2, 2))


@pytest.mark.slow
def test_the_bias_of_means_is_their_expected_distance() -> None:
    """Sets of 5 and 7 from one distribution: the mean over many draws of |m1 - m2|^2."""
    draws, generator = 1000, torch.Generator().manual_seed(0)
    a, b = (torch.randn(draws, n, 3, generator=generator, dtype=torch.float64) for n in (5, 7))
    expected = (a.mean(1) - b.mean(1)).square().sum(1).mean()
    found = [bias_of_means(Gaussian.of(x), Gaussian.of(y)) for x, y in zip(a, b, strict=True)]
    # Both scatter by less than 4% over this many draws.
    assert sum(found) / draws == pytest.approx(float(expected), rel=0.08)
