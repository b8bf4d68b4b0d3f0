"""Plain replay of a resampling trace: each move is checked against the rule, none is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from varptq.calibrate.resample import Move

SCORE_TOLERANCE = 1e-6  # float32 sums of at most a few hundred probabilities


def replay(
    ids_Nl: np.ndarray, probs_NlV: np.ndarray, target_V: np.ndarray, moves: Sequence[Move]
) -> np.ndarray:
    """Apply `moves` to the ids of one scale, asserting each; returns the new ids (N, l)."""
    ids = ids_Nl.copy()
    counts = np.bincount(ids.ravel(), minlength=len(target_V))
    queue = list(moves)
    for entry in np.flatnonzero(counts > target_V):
        excess = counts[entry] - target_V[entry]
        own, queue = queue[:excess], queue[excess:]
        under = counts < target_V
        places = np.argwhere(ids == entry)
        scores = {(i, p): probs_NlV[i, p][under].sum() for i, p in places.tolist()}
        largest = sorted(scores.values(), reverse=True)
        assert len({(move.image, move.position) for move in own}) == excess
        for rank, move in enumerate(own):
            assert move.over_entry == entry
            score = scores[move.image, move.position]
            assert abs(score - largest[rank]) <= SCORE_TOLERANCE
            assert abs(score - move.score) <= SCORE_TOLERANCE
            still_short = counts < target_V
            weight = probs_NlV[move.image, move.position] * still_short
            assert still_short[move.new_entry]
            assert move.uniform == (weight.sum() == 0)
            assert move.uniform or weight[move.new_entry] > 0
            ids[move.image, move.position] = move.new_entry
            counts[entry] -= 1
            counts[move.new_entry] += 1
    assert not queue
    return ids
