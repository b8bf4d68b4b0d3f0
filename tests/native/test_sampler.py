"""The native sampler against the functions it stands for, and its bits against everything else.

Where borders are exact (few distinct logits, whole powers of two) the kept set must be that of a
loop in exact arithmetic; where they are not, an entry may differ only as far as float32 sums do.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.errors import NonFiniteError
from varptq.models.sampling import (
    ImageRandom,
    filter_logits,
    guided,
    image_randoms,
    sample_ids,
)
from varptq.native import binding

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason() or "built"),
]

native = pytest.importorskip("varptq.native.sampler")

# Cumulative sums of up to 4096 float32 probabilities, in another order and with another exp.
BORDER = 2e-5
LN2 = 0.6931471805599453


def uniforms(seed: int, rows: int, length: int, vocabulary: int) -> Tensor:
    return torch.stack([r.uniform(length, vocabulary) for r in image_randoms(seed, range(rows))])


def normal(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor, **settings: Any) -> Tensor:
    return native.sample(logits, filtered=True, **settings).filtered > -torch.inf


def exact_top_p(powers: list[int], top_p: float) -> list[bool]:
    """Kept entries of logits ln 2 * powers: ascending and, among equals, the last index first."""
    weights = [Fraction(2) ** power for power in powers]
    total, below = sum(weights), Fraction(0)
    keep = [True] * len(powers)
    for i in sorted(range(len(powers)), key=lambda i: (powers[i], -i))[:-1]:
        below += weights[i]
        keep[i] = below > (1 - Fraction(top_p)) * total
    return keep


@given(st.lists(st.just(0), min_size=1, max_size=70), st.sampled_from([0.25, 0.5, 0.75]))
def test_top_p_among_equals_drops_the_last_ones(powers: list[int], top_p: float) -> None:
    assert kept(torch.zeros(1, 1, len(powers)), top_k=0, top_p=top_p)[0, 0].tolist() == exact_top_p(
        powers, top_p
    )


@given(
    st.lists(st.integers(-6, 3), min_size=1, max_size=70),
    st.integers(0, 70),
    st.sampled_from([0.0, 0.1003, 0.5007, 0.9601, 1.0, 1e-12]),
)
@settings(max_examples=200, deadline=None)
def test_kept_entries_are_those_of_a_loop(powers: list[int], top_k: int, top_p: float) -> None:
    """top_p is off every multiple of the weights' unit, so no border is a tie of rounding."""
    logits = torch.tensor([[powers]]) * LN2
    got = kept(logits, top_k=top_k, top_p=top_p)[0, 0].tolist()
    candidates = [i for i in range(len(powers))]
    if 0 < top_k < len(powers):
        border = sorted(powers)[-top_k]
        candidates = [i for i in candidates if powers[i] >= border]
    keep = [i in candidates for i in range(len(powers))]
    if 0 < top_p < 1:
        stays = exact_top_p([powers[i] for i in candidates], top_p)
        for i, stay in zip(candidates, stays, strict=True):
            keep[i] = stay
    assert got == keep


@pytest.mark.parametrize("vocabulary", [1, 5, 37, 130, 4096])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (3, 1.0), (0, 0.9), (900, 0.96), (37, 0.5)])
def test_the_torch_functions_agree(vocabulary: int, top_k: int, top_p: float) -> None:
    t, temperature = 1.3, 0.7
    both = normal(vocabulary, 4, 3, vocabulary)
    uniform = uniforms(1, 2, 3, vocabulary)
    logits = guided(both, t)
    want = filter_logits(logits, top_k, top_p)
    got = native.sample(
        both,
        guidance=t,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        uniform_BlV=uniform,
        filtered=True,
    )
    same = (want > -torch.inf) == (got.filtered > -torch.inf)
    assert torch.equal(want[same], got.filtered[same])
    if not same.all():
        # Where sets differ, the cumulative probability of the entry lies on the border.
        p = filter_logits(logits, top_k, 0).softmax(-1)
        below = torch.stack([(p * (p <= x[..., None])).sum(-1) for x in p.unbind(-1)], -1)
        assert ((below - (1 - top_p)).abs()[~same] < BORDER).all()
    ids = sample_ids(want, image_randoms(1, range(2)), temperature)
    assert torch.equal(ids, got.ids)


def test_noise_is_that_of_the_image_to_rounding() -> None:
    """With logits a little apart, an id tells how the noise of two entries compares."""
    uniform = uniforms(3, 1, 2000, 2)
    noise = ImageRandom(3, 0).gumbel(2000, 2)
    gap = noise[:, 0] - noise[:, 1]
    for error, want in ((2e-6, 1), (-2e-6, 0)):
        # The second entry wins by `error` only if the noise is right to that much.
        logits = torch.stack((torch.zeros(2000), gap + error), -1)[None]
        ids = native.sample(logits, top_k=0, top_p=0, uniform_BlV=uniform).ids
        big = gap.abs() < 8
        assert (ids[0][big] == want).all()


def test_the_ends_of_the_uniform_numbers_are_finite_noise() -> None:
    uniform = torch.tensor([2.0**-25, 0.5, 1 - 2.0**-24])[None, None]
    for index, noise in ((0, 17.3287), (2, -2.8115)):
        # What the entry in the middle, whose noise is 0.3665, needs to be level with it.
        for shift, want in ((1e-3, 1), (-1e-3, index)):
            logits = torch.full((1, 1, 3), -torch.inf)
            logits[0, 0, index] = 0
            logits[0, 0, 1] = noise - 0.3665 + shift
            got = native.sample(logits, top_k=0, top_p=0, uniform_BlV=uniform).ids
            assert int(got) == want


@given(
    rows=st.integers(1, 9),
    length=st.sampled_from([1, 3, 5]),
    vocabulary=st.sampled_from([3, 37, 300]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_bits_do_not_depend_on_batch_threads_or_instruction_set(
    rows: int, length: int, vocabulary: int, threads: int, seed: int
) -> None:
    logits = normal(seed, rows, length, vocabulary)
    uniform = uniforms(seed, rows, length, vocabulary)
    chosen: dict[str, Any] = {"top_k": 30, "top_p": 0.8, "filtered": True}
    parts = [
        native.sample(x, uniform_BlV=u, **chosen)
        for x, u in zip(logits.split(1), uniform.split(1), strict=True)
    ]
    before, isa = torch.get_num_threads(), binding.isa()
    torch.set_num_threads(threads)
    try:
        for name in binding.features():
            assert binding.select_isa(name)
            whole = native.sample(logits, uniform_BlV=uniform, **chosen)
            assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))
            assert torch.equal(whole.filtered, torch.cat([part.filtered for part in parts]))
    finally:
        torch.set_num_threads(before)
        binding.select_isa(isa)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 40, 129])
def test_the_first_row_that_is_not_finite_is_named(bad: float, at: int) -> None:
    logits = normal(0, 3, 2, 130)
    logits[2, 0, 5] = logits[1, 1, at] = bad
    with pytest.raises(NonFiniteError, match="logits of batch row 1"):
        native.sample(logits, top_k=9, top_p=0.9, uniform_BlV=uniforms(0, 3, 2, 130))


def test_minus_infinity_is_never_drawn_and_a_row_of_it_is_refused() -> None:
    logits = torch.full((1, 1, 40), -torch.inf)
    uniform = uniforms(0, 1, 1, 40)
    with pytest.raises(NonFiniteError, match="logits of batch row 0"):
        native.sample(logits, top_k=9, top_p=0.9, uniform_BlV=uniform)
    logits[..., 33] = -1e30
    for top_k, top_p in ((0, 0.0), (9, 0.9), (39, 0.999)):
        got = native.sample(logits, top_k=top_k, top_p=top_p, uniform_BlV=uniform, filtered=True)
        assert got.ids is not None and got.filtered is not None
        assert int(got.ids) == 33
        assert torch.equal(got.filtered, logits)


def test_without_uniform_numbers_nothing_is_drawn() -> None:
    assert native.sample(normal(0, 1, 2, 9), top_k=0, top_p=0) == (None, None)
