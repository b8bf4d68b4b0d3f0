"""Filters against a loop, draws against probabilities, and independence of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varptq.errors import ConfigError, NonFiniteError
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import (
    ImageRandom,
    SamplingSettings,
    filter_logits,
    guidance_strength,
    guided,
    gumbel_noise,
    image_randoms,
    sample_ids,
    smooth_embedding,
)
from varptq.models.scales import Scales


def filter_row(row: list[float], top_k: int, top_p: float) -> list[bool]:
    """Which entries of one row are kept, entry by entry."""
    values = torch.tensor(row, dtype=torch.float64)
    keep = [True] * len(row)
    if 0 < top_k < len(row):
        kth = sorted(row)[-top_k]
        keep = [value >= kth for value in row]
    if 0 < top_p < 1:
        weights = [float(v.exp()) if kept else 0.0 for v, kept in zip(values, keep, strict=True)]
        total, below = sum(weights), 0.0
        ascending = sorted((w, i) for i, w in enumerate(weights) if keep[i])
        for weight, index in ascending[:-1]:
            below += weight / total
            keep[index] = below > 1 - top_p
    return keep


@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=37, unique=True),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.1003, 0.5007, 0.9601, 1.0]),
)
def test_filter_equals_a_loop(tenths, top_k, top_p):
    row = [value / 10 for value in tenths]
    kept = filter_logits(torch.tensor([[row]]), top_k, top_p)[0, 0] > -torch.inf
    assert kept.tolist() == filter_row(row, top_k, top_p)


def test_filter_keeps_ties_at_the_kth_and_the_values():
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0])
    inf = float("inf")
    assert filter_logits(logits, 2, 0).tolist() == [3.0, -inf, 2.0, 2.0, -inf]
    assert filter_logits(logits, 0, 0).tolist() == logits.tolist()
    assert filter_logits(logits, 99, 1).tolist() == logits.tolist()
    # So small that 1 - top_p rounds to 1.
    assert filter_logits(logits, 0, 1e-12).tolist() == [3.0, -inf, -inf, -inf, -inf]
    # Two of the ties stay after top-k, so top-p sees three candidates where top_k says two.
    assert (filter_logits(logits, 2, 0.999) > -inf).tolist() == [True, False, True, True, False]


def test_filter_leaves_its_input_alone_and_answers_in_float32():
    logits = torch.randn(2, 3, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = logits.clone()
    assert filter_logits(logits, 7, 0.9).dtype == torch.float32
    assert torch.equal(logits, before)


def test_guidance():
    scales = Scales((1, 2, 3))
    assert [guidance_strength(4.0, k, scales) for k in range(3)] == [0.0, 2.0, 4.0]
    assert guidance_strength(4.0, 0, Scales((1,))) == 0.0
    logits = torch.tensor([[[1.0, 2.0]], [[0.0, 5.0]]])
    assert guided(logits, 0.5).tolist() == [[[1.5, 0.5]]]
    assert torch.equal(guided(logits, 0.0), logits[:1])


def test_draws_do_not_depend_on_the_batch():
    logits_BlV = torch.randn(5, 3, 37, generator=torch.Generator().manual_seed(1))
    whole = sample_ids(logits_BlV, image_randoms(7, range(5)))
    again = sample_ids(logits_BlV, image_randoms(7, range(5)))
    parts = [
        sample_ids(logits_BlV[i : i + 2], image_randoms(7, range(i, min(i + 2, 5))))
        for i in (0, 2, 4)
    ]
    shuffled = sample_ids(logits_BlV[[3, 0]], image_randoms(7, [3, 0]))
    assert torch.equal(whole, again)
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(shuffled, whole[[3, 0]])


def test_streams_differ_by_seed_image_and_purpose_and_leave_the_global_generator():
    state = torch.get_rng_state()
    streams = [
        ImageRandom(seed, image, purpose).uniform(4)
        for seed in (0, 1, -1, 2**40)
        for image in (0, 1, 2**20)
        for purpose in ("tokens", "resample")
    ]
    assert len({tuple(stream.tolist()) for stream in streams}) == len(streams)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_no_two_images_of_a_run_share_a_stream():
    randoms = image_randoms(0, range(50_000))
    assert len({random.uniform(2).numpy().tobytes() for random in randoms}) == len(randoms)


def test_successive_draws_are_new_and_of_the_asked_dtype():
    randoms = image_randoms(0, [3, 1])
    first, second = (gumbel_noise(randoms, 4, 5, torch.device("cpu")) for _ in range(2))
    assert first.shape == (2, 4, 5) and first.dtype == torch.float32
    assert not torch.equal(first, second)


def test_gumbel_noise_is_finite_at_the_ends_of_the_uniform():
    values = ImageRandom(0, 0).uniform(2_000_000)
    assert values.min() > 0 and values.max() < 1
    noise = -torch.log(-torch.log1p(-torch.tensor([2.0**-25, 1 - 2.0**-24])))
    assert noise.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_frequencies_follow_the_softmax(dtype, temperature):
    logits = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05]).log()
    probs = (logits / temperature).softmax(-1)
    count = 20_000
    ids = sample_ids(logits.to(dtype).expand(1, count, 5), image_randoms(2, [0]), temperature)
    frequency = torch.bincount(ids.flatten(), minlength=5) / count
    # Five standard deviations of a binomial frequency; bfloat16 logits are off by 2^-9 relative.
    tolerance = 5 * (0.25 / count) ** 0.5 + (0.01 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(frequency, probs, rtol=0, atol=tolerance)
    assert frequency[1] == 0


def test_the_smallest_temperature_takes_the_likeliest():
    logits_BlV = torch.randn(1, 37, 130, generator=torch.Generator().manual_seed(4))
    ids = sample_ids(logits_BlV, image_randoms(0, [0]), 1e-300)
    assert torch.equal(ids, logits_BlV.argmax(-1))


def test_a_small_change_of_logits_rarely_changes_ids():
    """Common random numbers make a quantized model's images comparable with the float model's."""
    generator = torch.Generator().manual_seed(3)
    logits_BlV = 3 * torch.randn(2, 200, 130, generator=generator)
    moved = logits_BlV + 0.01 * torch.randn(2, 200, 130, generator=generator)
    ids, other = (sample_ids(x, image_randoms(0, [0, 1])) for x in (logits_BlV, moved))
    assert (ids != other).float().mean() < 0.03


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_logits_are_named(bad):
    logits_BlV = torch.zeros(3, 2, 5)
    logits_BlV[1, 1] = bad
    for top_p in (0.0, 0.9):
        with pytest.raises(NonFiniteError, match="batch row 1"):
            sample_ids(filter_logits(logits_BlV, 3, top_p), image_randoms(0, range(3)))


def test_smooth_embedding_tends_to_one_row():
    codebook = torch.eye(4)
    filtered = torch.tensor([[[0.0, 40.0, -torch.inf, 1.0]]])
    h = smooth_embedding(filtered, torch.zeros(1, 1, 4), codebook.bfloat16(), ratio=1.0)
    assert h.dtype == torch.bfloat16
    assert h.tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cfg", -0.1),
        ("cfg", float("nan")),
        ("cfg", float("inf")),
        ("cfg", 1e308),
        ("cfg", (1.0, 1e7)),
        ("cfg", 10**400),
        ("tau", 1e-45),
        ("tau", (1.0, 1e-7)),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("temperature", 0),
        ("temperature", -1),
        ("temperature", 1e-45),
        ("temperature", float("inf")),
        ("steps", 3),
    ],
)
def test_bad_settings_are_refused_in_one_line(field, value):
    with pytest.raises(ConfigError, match=field) as error:
        SamplingSettings(**{field: value})
    assert "\n" not in str(error.value)


def test_the_ends_of_the_settings_can_be_drawn(any_tiny: Pipeline) -> None:
    ends: list[dict[str, Any]] = [{"cfg": 1e6}, {"tau": 1e-6}, {"tau": 100}, {"temperature": 1e-6}]
    ends.append({"cfg": 1e6, "tau": 1e-6, "temperature": 1e-6})
    for end in ends:
        for smooth in (False, True):
            generate(any_tiny, [0, 1], decode=False, more_smooth=smooth, **end)
