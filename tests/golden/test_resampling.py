"""Resampling against the reference: counts exactly, choices by replay, as the draws differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.resample_oracle import replay
from varptq.calibrate.resample import Move, resample_tokens, target_counts
from varptq.models.scales import Scales

L1_TOLERANCE = 1e-5  # the reference sums V float32 terms


@pytest.fixture(scope="module")
def data(golden):
    return golden.npz("e_resampling.npz")


def test_counts_and_distances(data):
    scales = Scales(data["patch_nums"])
    probs_NLV = torch.from_numpy(data["prob_BlV"])
    ids_NL = torch.from_numpy(data["sampled_ids"])
    new_NL, report = resample_tokens(
        ids_NL, lambda k: probs_NLV[:, scales.slices()[k]], scales.lengths, seed=0
    )
    for k, (part, scale) in enumerate(zip(scales.slices(), report.scales, strict=True)):
        assert np.array_equal(scale.target_count, data["target_count"][k])
        assert np.array_equal(scale.count_before, data["sampled_count"][k])
        counts = torch.bincount(new_NL[:, part].flatten(), minlength=probs_NLV.shape[-1])
        assert np.array_equal(counts, data["target_count"][k])
        assert scale.l1_before == pytest.approx(data["l1_before"][k], abs=L1_TOLERANCE)
        assert scale.l1_after == pytest.approx(data["l1_after"][k], abs=L1_TOLERANCE)
        replayed = replay(
            data["sampled_ids"][:, part],
            data["prob_BlV"][:, part],
            data["target_count"][k],
            scale.moves,
        )
        assert np.array_equal(replayed, new_NL[:, part])
    assert report.num_moved == len(data["trace"])


def test_reference_trace_follows_our_rule(data):
    """The oracle accepts the reference's trace too, so ours obeys the reference's rule."""
    scales = Scales(data["patch_nums"])
    column = {name: i for i, name in enumerate(data["trace_columns"].tolist())}
    order = [column[n] for n in ("over_entry", "image", "position", "new_entry")]
    for k, part in enumerate(scales.slices()):
        moves = [
            Move(
                *row[order].tolist(),
                score=float(score),
                uniform=bool(row[column["uniform_fallback"]]),
            )
            for row, score in zip(data["trace"], data["trace_score"], strict=True)
            if row[column["scale"]] == k
        ]
        target = target_counts(
            torch.from_numpy(data["prob_mean"][k]), len(data["labels"]) * scales.lengths[k]
        )
        ids = replay(data["sampled_ids"][:, part], data["prob_BlV"][:, part], target.numpy(), moves)
        assert np.array_equal(ids, data["resampled_ids"][:, part])
