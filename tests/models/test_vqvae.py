"""The VQVAE and the token pyramid: shapes, invariants, brute-force search, refused arguments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.errors import InputError
from varptq.models.scales import Scales
from varptq.models.var.pyramid import TokenPyramid, phi_index
from varptq.models.var.vqvae import VQVAE, VQVAEArch

V, CVAE = 37, 5
SCHEDULES = [(1,), (3,), (1, 3), (1, 2, 5), (2, 3, 3, 7)]  # one scale, odd sides, a repeated side
ARCH = VQVAEArch(
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    code_dim=CVAE,
    codebook_size=V,
    num_phi=3,
    attn_levels=(1,),
    mid_attn=True,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_vae(sides: tuple[int, ...], arch: VQVAEArch = ARCH) -> VQVAE:
    vae = VQVAE(arch, Scales(sides))
    vae.randomize(generator())
    return vae.eval().requires_grad_(False)


def make_pyramid(sides: tuple[int, ...]) -> TokenPyramid:
    return make_vae(sides).quantize


def random_ids(pyramid: TokenPyramid, batch: int, seed: int = 1) -> Tensor:
    shape = (batch, pyramid.scales.num_tokens)
    return torch.randint(0, V, shape, generator=generator(seed))


@pytest.mark.parametrize("sides", SCHEDULES)
def test_shapes(sides: tuple[int, ...]) -> None:
    vae = make_vae(sides)
    side = 2 * sides[-1]
    assert vae.image_size == (side, side)
    images = torch.rand(3, 3, side, side, generator=generator()) * 2 - 1
    ids = vae.encode(images)
    assert ids.shape == (3, vae.scales.num_tokens)
    assert ids.dtype == torch.int64
    decoded = vae.decode(ids)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    later = vae.scales.num_tokens - sides[0] ** 2
    assert vae.teacher_inputs(ids).shape == (3, later, CVAE)


@pytest.mark.parametrize("sides", SCHEDULES)
def test_stepwise_sum_equals_the_whole(sides: tuple[int, ...]) -> None:
    """The calls a sampling loop makes, against the two calls on whole sequences."""
    pyramid = make_pyramid(sides)
    ids = random_ids(pyramid, batch=2)
    f_hat, inputs = pyramid.zeros(2), []
    for scale, part in enumerate(pyramid.scales.slices()):
        f_hat = pyramid.add_scale(f_hat, pyramid.embed(ids[:, part]), scale)
        assert torch.equal(f_hat, pyramid.accumulate(ids[:, : part.stop]))
        if scale < pyramid.scales.num_scales - 1:
            inputs.append(pyramid.next_input(f_hat, scale))
    stepwise = torch.cat(inputs, dim=1) if inputs else torch.empty(2, 0, CVAE)
    assert torch.equal(stepwise, pyramid.teacher_inputs(ids))


def test_rows_are_independent() -> None:
    vae = make_vae((1, 2, 5))
    ids = random_ids(vae.quantize, batch=3)
    alone = torch.cat([vae.decode(row[None]) for row in ids])
    torch.testing.assert_close(vae.decode(ids), alone, atol=1e-5, rtol=0.0)


def test_nearest_is_the_brute_force_minimum() -> None:
    pyramid = make_pyramid((1, 3))
    z_BlC = torch.randn(2, 130, CVAE, generator=generator(3))
    codes = pyramid.embedding.weight.double()
    distances = (z_BlC.double()[:, :, None, :] - codes).square().sum(dim=-1)
    assert torch.equal(pyramid.nearest(z_BlC), distances.argmin(dim=-1))


def test_encode_is_greedy_on_the_residual() -> None:
    """Every id is the best given the coarser ids: brute force over area means of the residual."""
    pyramid = make_pyramid((1, 2, 4))
    features = torch.randn(2, CVAE, 4, 4, generator=generator(4))
    ids = pyramid.encode(features)
    for scale, part in enumerate(pyramid.scales.slices()):
        before = pyramid.accumulate(ids[:, : part.start]) if scale else pyramid.zeros(2)
        side = pyramid.scales.sides[scale][0]
        block = 4 // side
        cells = (features - before).unfold(2, block, block).unfold(3, block, block)
        means_BlC = cells.mean(dim=(-1, -2)).flatten(2).transpose(1, 2)
        distances = torch.cdist(means_BlC.double(), pyramid.embedding.weight.double())
        assert torch.equal(ids[:, part], distances.argmin(dim=-1))


def test_codebook_entries_at_the_last_scale_are_found_again() -> None:
    """The last scale is not resized before the search, so encoding undoes embedding."""
    pyramid = make_pyramid((3,))
    ids = random_ids(pyramid, batch=2)
    features = pyramid.embed(ids).transpose(1, 2).unflatten(2, (3, 3))
    assert torch.equal(pyramid.encode(features), ids)


@given(num_scales=st.integers(1, 40), num_phi=st.integers(1, 9))
def test_phi_index_is_monotone_and_near(num_scales: int, num_phi: int) -> None:
    index = phi_index(num_scales, num_phi)
    assert len(index) == num_scales
    assert all(0 <= j < num_phi for j in index)
    assert list(index) == sorted(index)
    if num_scales > 1:
        mirrored = [num_phi - 1 - j for j in reversed(index)]
        # Symmetric but for exact ties, which rounding decides.
        assert all(abs(a - b) <= 1 for a, b in zip(index, mirrored, strict=True))
        assert (index[0], index[-1]) == (0, num_phi - 1)


def test_phi_index_of_the_released_models() -> None:
    assert phi_index(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


@settings(max_examples=20, deadline=None)
@given(
    sides=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(sorted),
    batch=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_f_hat_is_additive_over_scales(sides: list[int], batch: int, seed: int) -> None:
    pyramid = make_pyramid(tuple(sides))
    ids = random_ids(pyramid, batch, seed)
    parts = [
        pyramid.contribution(pyramid.embed(ids[:, part]), scale)
        for scale, part in enumerate(pyramid.scales.slices())
    ]
    torch.testing.assert_close(pyramid.accumulate(ids), torch.stack(parts).sum(dim=0))


def test_bf16_runs_and_stays_near_float32() -> None:
    vae = make_vae((1, 2, 5))
    ids = random_ids(vae.quantize, batch=2)
    image = vae.decode(ids)
    half = vae.to(torch.bfloat16)
    low = half.decode(ids)
    assert low.dtype == torch.bfloat16
    assert half.teacher_inputs(ids).dtype == torch.bfloat16
    assert half.encode(image).dtype == torch.int64
    # Twelve layers of bf16, 8 bits of mantissa each.
    assert (low.float() - image).abs().mean() < 0.05


def test_randomize_depends_on_the_generator_alone() -> None:
    first, second = make_vae((1, 3)).state_dict(), make_vae((1, 3)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(2, 4, dtype=torch.int64),  # not whole scales
        torch.zeros(10, dtype=torch.int64),  # no batch axis
        torch.zeros(2, 10),  # floating point
        torch.full((2, 10), V),  # past the codebook
        torch.full((2, 10), -1),
    ],
    ids=["length", "rank", "dtype", "high", "negative"],
)
def test_unusable_ids_are_one_line(ids: Tensor) -> None:
    vae = make_vae((1, 3))
    for call in (vae.decode, vae.teacher_inputs):
        with pytest.raises(InputError) as caught:
            call(ids)
        assert "\n" not in str(caught.value)
        assert "expected" in str(caught.value)


def test_teacher_inputs_want_all_scales() -> None:
    with pytest.raises(InputError, match="cover 1 tokens: expected all 10"):
        make_vae((1, 3)).teacher_inputs(torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 3, 5, 5), (1, 1, 6, 6), (1, 3, 6, 8)])
def test_unusable_images_are_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(images, 3, 6, 6\)"):
        make_vae((1, 3)).encode(torch.zeros(shape))


def test_integer_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"torch.uint8: expected floating point"):
        make_vae((1, 3)).encode(torch.zeros(1, 3, 6, 6, dtype=torch.uint8))
