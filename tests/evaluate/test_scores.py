"""The Inception Score against its definition, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varptq.errors import InputError
from varptq.evaluate.scores import InceptionScore, inception_score


def distributions(count: int, classes: int, seed: int = 0) -> Tensor:
    """(N, K) float32, some entries exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    kept = torch.rand(count, classes, generator=generator) < 0.7
    kept[:, 0] = True
    return logits.masked_fill(~kept, -torch.inf).softmax(1)


def by_definition(p_NK: Tensor, split_size: int) -> float:
    scores = []
    for start in range(0, len(p_NK), split_size):
        rows = p_NK[start : start + split_size].double().tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        divergences = [
            sum(p * math.log(p / q) for p, q in zip(row, mean, strict=True) if p > 0)
            for row in rows
        ]
        scores.append(math.exp(sum(divergences) / len(rows)))
    return sum(scores) / len(scores)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 45), st.integers(0, 1000))
def test_it_is_its_definition(count: int, classes: int, split: int, seed: int) -> None:
    p_NK = distributions(count, classes, seed)
    assert inception_score(p_NK, split) == pytest.approx(by_definition(p_NK, split), rel=1e-9)


@pytest.mark.slow
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_batches_do_not_matter_but_splits_do(sizes: list[int], split: int) -> None:
    p_NK = distributions(sum(sizes) + 1, 5)
    stream = InceptionScore(split)
    for part in p_NK.split([1, *sizes]):
        stream.update(part)
    assert stream.score == pytest.approx(inception_score(p_NK, split), rel=1e-12)
    assert len(stream.scores) == math.ceil(len(p_NK) / split)


def test_the_ends_of_its_range() -> None:
    assert inception_score(torch.full((7, 10), 0.1)) == pytest.approx(1.0, abs=1e-6)
    assert inception_score(torch.eye(10).repeat(3, 1)) == pytest.approx(10.0, rel=1e-9)


def test_sorted_images_lose_the_score_that_shuffled_ones_have() -> None:
    p_NK = torch.eye(10).repeat_interleave(30, 0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert inception_score(p_NK, 30) == pytest.approx(1.0)
    assert inception_score(p_NK[order], 30) > 7


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="softmax outputs"):
        inception_score(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="softmax outputs"):
        inception_score(torch.full((1, 2), torch.nan))
    stream = InceptionScore()
    with pytest.raises(InputError, match="at least 1 image"):
        _ = stream.score
    stream.update(torch.eye(3))
    with pytest.raises(InputError, match=r"shape \(4, 4\), expected \(B, 3\)"):
        stream.update(torch.eye(4))
    with pytest.raises(InputError, match="split_size 0"):
        InceptionScore(0)
