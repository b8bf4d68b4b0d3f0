"""Resampling on random small cases: the target is met and every move obeys the rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.resample_oracle import replay
from varptq.calibrate.resample import resample_scale, resample_tokens, target_counts
from varptq.errors import InputError, NonFiniteError
from varptq.models.sampling import image_randoms
from varptq.models.scales import Scales


def case(seed: int, images: int, length: int, vocabulary: int, sparse: bool):
    """Random ids (N, l) and probabilities (N, l, V), the latter mostly zero if `sparse`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, length, vocabulary, generator=generator)
    if sparse:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) - 2, -torch.inf)
    ids = torch.randint(vocabulary, (images, length), generator=generator)
    return ids, logits.softmax(-1)


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(1, 1, 1), (1, 3, 2), (3, 1, 5), (7, 9, 37), (4, 16, 130)]),
    st.booleans(),
)
def test_histogram_becomes_the_target(seed, sizes, sparse):
    ids, probs = case(seed, *sizes, sparse)
    new, report = resample_scale(ids, probs, image_randoms(seed, range(sizes[0])))
    counts = torch.bincount(new.flatten(), minlength=sizes[2])
    assert torch.equal(counts, report.target_count)
    assert torch.equal(counts, report.count_after)
    assert report.target_count.sum() == ids.numel()
    assert len(report.moves) == (report.count_before - counts).clamp(min=0).sum()
    replayed = replay(ids.numpy(), probs.numpy(), counts.numpy(), report.moves)
    assert np.array_equal(replayed, new)


@given(st.integers(0, 10_000), st.integers(1, 130), st.integers(1, 500))
def test_target_counts_are_floor_or_ceiling_and_sum_to_n(seed, vocabulary, n):
    mean = torch.rand(vocabulary, generator=torch.Generator().manual_seed(seed))
    mean /= mean.sum()
    counts = target_counts(mean, n)
    assert counts.sum() == n
    assert ((counts - mean * n).abs() < 1 + 1e-3).all()


def test_target_counts_give_equal_fractions_to_the_lower_entry():
    assert target_counts(torch.tensor([0.25, 0.25, 0.25, 0.25]), 6).tolist() == [2, 2, 1, 1]
    assert target_counts(torch.tensor([0.0, 0.5, 0.5]), 4).tolist() == [0, 2, 2]


def test_equal_scores_go_in_order_of_image_and_position():
    ids = torch.zeros(3, 2, dtype=torch.int64)
    probs = torch.full((3, 2, 2), 0.5)
    new, report = resample_scale(ids, probs, image_randoms(0, range(3)))
    assert [(move.image, move.position) for move in report.moves] == [(0, 0), (0, 1), (1, 0)]
    assert new.flatten().tolist() == [1, 1, 1, 0, 0, 0]


def test_draws_follow_the_position_restricted_to_short_entries():
    probs = torch.tensor([0.2, 0.6, 0.2]).repeat(1, 4, 1)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    firsts, count = [], 400
    for seed in range(count):
        _, report = resample_scale(ids, probs, image_randoms(seed, [0]))
        assert report.target_count.tolist() == [1, 2, 1]
        firsts.append(report.moves[0].new_entry)
    # 0.6 of 0.6 + 0.2, within five standard deviations.
    assert abs(firsts.count(1) / count - 0.75) < 5 * (0.1875 / count) ** 0.5
    assert set(firsts) == {1, 2}


def test_position_without_mass_on_short_entries_draws_uniformly_among_them():
    """Both tokens of entry 1 could draw nothing but entry 0, which is not short."""
    ids = torch.tensor([[1, 1, 0, 0]])
    probs = torch.tensor([[[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]])
    firsts = set()
    for seed in range(40):
        new, report = resample_scale(ids, probs, image_randoms(seed, [0]))
        assert [move.uniform for move in report.moves] == [True, True]
        assert sorted(new[0].tolist()) == [0, 0, 2, 3]
        firsts.add(report.moves[0].new_entry)
    assert firsts == {2, 3}


def scaled_case(seed: int, images: int = 6):
    """Ids and probabilities of three scales as `resample` takes them."""
    scales = Scales((1, 2, 3))
    ids, probs = case(seed, images, scales.num_tokens, 37, sparse=True)
    return scales, ids, lambda k: probs[:, scales.slices()[k]]


def test_all_scales():
    scales, ids, probs_of_scale = scaled_case(0)
    original = ids.clone()
    new, report = resample_tokens(ids, probs_of_scale, scales.lengths, seed=3)
    assert torch.equal(ids, original)
    assert new.shape == ids.shape and new.dtype == torch.int64
    assert report.num_moved == (new != ids).sum()
    for part, scale in zip(scales.slices(), report.scales, strict=True):
        counts = torch.bincount(new[:, part].flatten(), minlength=37)
        assert torch.equal(counts, scale.target_count)
        assert scale.l1_after <= scale.l1_before


def test_seed_decides_the_draws():
    scales, ids, probs_of_scale = scaled_case(1)
    first, again, other = (
        resample_tokens(ids, probs_of_scale, scales.lengths, seed)[0] for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_report_as_a_document():
    scales, ids, probs_of_scale = scaled_case(2)
    _, report = resample_tokens(ids, probs_of_scale, scales.lengths, seed=0)
    short = json.loads(json.dumps(report.to_dict()))
    assert [scale["tokens"] for scale in short["scales"]] == [6, 24, 54]
    assert sum(scale["moved"] for scale in short["scales"]) == short["moved"] == report.num_moved
    full = json.loads(json.dumps(report.to_dict(details=True)))
    assert len(full["scales"][2]["moves"]) == full["scales"][2]["moved"]
    assert sum(full["scales"][1]["count_after"]) == 24


def test_shapes_that_do_not_fit_are_named():
    scales, ids, probs_of_scale = scaled_case(0)
    with pytest.raises(InputError, match=r"ids have shape \(6, 13\): expected \(N, 14\)"):
        resample_tokens(ids[:, 1:], probs_of_scale, scales.lengths, seed=0)
    with pytest.raises(InputError, match=r"scale 0 have shape \(5, 1, 37\): expected \(6, 1, V\)"):
        resample_tokens(ids, lambda k: probs_of_scale(k)[1:], scales.lengths, seed=0)


def test_broken_probabilities_are_refused():
    ids, probs = case(0, 2, 3, 5, sparse=False)
    probs[1, 1, 2] = torch.nan
    with pytest.raises(NonFiniteError):
        resample_scale(ids, probs, image_randoms(0, range(2)))
