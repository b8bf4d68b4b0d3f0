"""The Inception Score: high if each image is recognisable and the images are not all alike.

    score of a split = exp(mean_i KL(p_i || mean_i p_i))        IS = mean over splits
Splits are runs of 5000 consecutive images, the last one shorter, as in the ADM suite; images sorted
by class make the score meaningless. Sums are accumulated in float64; no rows are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varptq.errors import InputError

SPLIT_SIZE = 5000
# float32 softmax over 1008 classes sums to 1 within this; logits do not.
SUM_TOLERANCE = 1e-3


class InceptionScore:
    """Feed batches of class probabilities in order, then read `score`."""

    def __init__(self, split_size: int = SPLIT_SIZE) -> None:
        if split_size < 1:
            raise InputError(f"split_size {split_size}: must be at least 1")
        self.split_size = split_size
        self._scores: list[float] = []
        self._count = 0
        self._sum_K: Tensor | None = None
        self._information = 0.0

    def update(self, probabilities_BK: Tensor) -> None:
        """Add rows of probabilities (B, K).

        Raises `InputError` for rows that are not distributions or have another K than before.
        """
        rows_BK = probabilities_BK.detach().double().cpu()
        known = None if self._sum_K is None else len(self._sum_K)
        if rows_BK.ndim != 2 or known not in (None, rows_BK.shape[1]):
            shape = tuple(rows_BK.shape)
            raise InputError(f"probabilities: shape {shape}, expected (B, {known or 'K'})")
        if not ((rows_BK.sum(1) - 1).abs() < SUM_TOLERANCE).all() or (rows_BK < 0).any():
            raise InputError("probabilities: rows do not sum to 1, expected softmax outputs")
        while len(rows_BK):
            taken = rows_BK[: self.split_size - self._count]
            rows_BK = rows_BK[len(taken) :]
            self._add(taken)

    def _add(self, rows_BK: Tensor) -> None:
        total_K = rows_BK.sum(0)
        self._sum_K = total_K if self._sum_K is None else self._sum_K + total_K
        self._information -= float(torch.special.entr(rows_BK).sum())
        self._count += len(rows_BK)
        if self._count == self.split_size:
            self._scores.append(self._open_score())
            self._count, self._information = 0, 0.0
            self._sum_K = torch.zeros_like(self._sum_K)

    def _open_score(self) -> float:
        """Score of the split being filled: sum p log p over images less that of their mean."""
        assert self._sum_K is not None
        mean_entropy = torch.special.entr(self._sum_K / self._count).sum()
        return float(torch.exp(self._information / self._count + mean_entropy))

    @property
    def scores(self) -> list[float]:
        """One score per split; the last split may be short."""
        return [*self._scores, self._open_score()] if self._count else list(self._scores)

    @property
    def score(self) -> float:
        """Mean over splits, from 1 to K. Raises `InputError` without images."""
        scores = self.scores
        if not scores:
            raise InputError("probabilities: none, an Inception Score needs at least 1 image")
        return sum(scores) / len(scores)


def inception_score(probabilities_NK: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """The Inception Score of all rows (N, K) at once; see `InceptionScore` for streams."""
    stream = InceptionScore(split_size)
    stream.update(probabilities_NK)
    return stream.score
