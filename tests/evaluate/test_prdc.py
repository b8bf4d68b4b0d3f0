"""Precision and recall against the definition, point by point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varptq.errors import InputError, NonFiniteError
from varptq.evaluate import prdc
from varptq.evaluate.prdc import precision_recall


def share_inside(points: np.ndarray, balls: np.ndarray, k: int) -> float:
    """Share of `points` within reach of a ball: as near as its k-th nearest other point."""
    inside = 0
    for point in points:
        for index, centre in enumerate(balls):
            others = np.delete(balls, index, 0)
            radius = np.sort(np.square(others - centre).sum(1))[k - 1]
            if np.square(point - centre).sum() <= radius:
                inside += 1
                break
    return inside / len(points)


def by_definition(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    a, b = real.double().numpy(), fake.double().numpy()
    return share_inside(b, a, k), share_inside(a, b, k)


# Small whole numbers make distances exact, ties and duplicates common.
grids = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=4, max_size=13)


@pytest.mark.slow
@given(grids, grids, st.integers(1, 3), st.sampled_from((0, 1000)))
def test_it_is_its_definition_ties_and_duplicates_included(
    real: list[tuple[int, ...]], fake: list[tuple[int, ...]], k: int, away: int
) -> None:
    """The mean, and so the centred features, are no floats."""
    first, second = torch.tensor(real).float() + away, torch.tensor(fake).float() + away
    assert precision_recall(first, second, k) == by_definition(first, second, k)


@pytest.mark.parametrize("dim", [1, 3, 130])
def test_real_valued_features_in_blocks_of_rows(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(dim)
    real = torch.randn(37, dim, generator=generator)
    fake = 0.7 * torch.randn(41, dim, generator=generator) + 0.3
    fake[:9] = real[:9] + 0.01
    whole = precision_recall(real, fake)
    assert whole == by_definition(real, fake, 3)
    assert 0 < whole[0] <= 1 and 0 < whole[1] <= 1
    for elements in (1, 41 * 5):
        monkeypatch.setattr(prdc, "BLOCK_ELEMENTS", elements)
        assert precision_recall(real, fake) == whole


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    x = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("dim", [37, 130])
def test_duplicates_lie_in_each_others_ball(dim: int, seed: int) -> None:
    """All radii are 0 here; rounding alone would put some copies outside."""
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(seed)) + 3
    assert precision_recall(x.repeat(4, 1), torch.cat((x.repeat(4, 1), x[:2]))) == (1.0, 1.0)


def test_few_modes_have_precision_without_recall() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.randn(50, 4, generator=generator) + 20 * i for i in range(4)])
    fake = torch.randn(200, 4, generator=generator) * 0.5
    precision, recall = precision_recall(real, fake)
    assert precision > 0.9 and recall < 0.3


def test_mistakes_are_named() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(InputError, match=r"fake features: shape \(3, 2\).*more than k = 3 rows"):
        precision_recall(x, x[:3])
    with pytest.raises(InputError, match=r"fake features: shape \(4, 1\)"):
        precision_recall(x, x[:, :1])
    with pytest.raises(InputError, match="k 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(NonFiniteError, match="real features"):
        precision_recall(x / 0, x)
