"""The native convolution: codes, scales and results equal those of plain torch, bit for bit, on
every instruction set, for odd sides and channels.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from varptq.errors import InputError, NonFiniteError
from varptq.native import binding
from varptq.native import convolution as native
from varptq.native.room import Room
from varptq.quant.affine import affine_codes, affine_grid
from varptq.runtime import reference_convolution as reference
from varptq.runtime.kernels import NormRule

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason()),
]

PER_IMAGE = (1, 2, 3)
# An exponential good to 2e-7 per unit, and a few roundings of results up to 100.
SILU_ERROR = 2e-5
# Codes that differ by one because a value lies within rounding of the border of two.
BORDER_CASES = 1e-3
# Sums of squares in double: what a norm of float32 sums misses is far above.
STATISTICS_ERROR = 1e-12


def sets() -> list[str]:
    names = [*binding.features(), *binding.EMULATED]
    return [name for name in names if binding.select_isa(name)]


class Case(NamedTuple):
    """What one convolution gets."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    stride: int
    padding: native.Padding
    upsample: bool


# The last two are large enough for words on every set (src/convolution/kernel_words.cpp).
SIDES = ((1, 1), (1, 5), (3, 3), (7, 13), (16, 17), (2, 40), (21, 33), (26, 30))
KINDS = {
    "3x3": (3, 1, (1, 1, 1, 1), False),
    "1x1": (1, 1, (0, 0, 0, 0), False),
    "down": (3, 2, (0, 1, 0, 1), False),
    "up": (3, 1, (1, 1, 1, 1), True),
    "up, two sides": (3, 1, (0, 1, 1, 0), True),
}


def case(kind: str, images: int, side: tuple[int, int], channels: tuple[int, int]) -> Case:
    kernel, stride, padding, upsample = KINDS[kind]
    g = torch.Generator().manual_seed(images + 10 * side[1] + 100 * channels[0])
    inputs, outputs = channels
    x = torch.randn(images, *side, inputs, generator=g) * torch.rand(images, 1, 1, 1, generator=g)
    weight = torch.randint(-127, 128, (outputs, inputs, kernel, kernel), generator=g)
    scale, bias = torch.rand(outputs, generator=g) / 100, torch.randn(outputs, generator=g)
    return Case(x + 0.3, weight.to(torch.int8), scale, bias, stride, padding, upsample)


def oracle(c: Case, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The definition in plain torch, its sums in double, where they are exact."""
    centred = (codes.double() - zero_point.double().view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
    if c.upsample:
        centred = F.interpolate(centred, scale_factor=2.0, mode="nearest")
    sums = F.conv2d(F.pad(centred, c.padding), c.weight.double(), stride=c.stride)
    sums = sums.permute(0, 2, 3, 1).to(torch.int32)
    return sums.float() * (scale.view(-1, 1, 1, 1) * c.scale) + c.bias


def run(c: Case, found: native.Codes, **more: object) -> Tensor:
    weight = native.pack(c.weight, c.scale)
    options = {"stride": c.stride, "padding": c.padding, "upsample": c.upsample, **more}
    return native.convolution(found, weight, c.bias, **options)  # pyright: ignore[reportArgumentType]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(KINDS)),
    st.integers(1, 3),
    st.sampled_from(SIDES),
    st.sampled_from([(1, 1), (3, 130), (37, 3), (64, 64), (32, 20), (5, 49), (160, 33)]),
)
def test_the_result_is_that_of_plain_torch(
    kind: str, images: int, side: tuple[int, int], channels: tuple[int, int]
) -> None:
    if kind == "down" and min(side) < 2:
        side = (max(side[0], 2), max(side[1], 2))
    c = case(kind, images, side, channels)
    grid = affine_grid(c.x, 8, PER_IMAGE)
    codes = affine_codes(c.x, grid, 8)
    want = oracle(c, codes, grid.scale, grid.zero_point)
    residual = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    for name in sets():
        binding.select_isa(name)
        found = native.map_codes(c.x)
        assert torch.equal(found.plain.float(), codes), name
        assert torch.equal(found.scale, grid.scale.flatten())
        assert torch.equal(found.zero_point.float(), grid.zero_point.flatten())
        moments = native.new_moments(images, channels[1])
        assert torch.equal(run(c, found, moments=moments), want), name
        assert torch.equal(moments.ends, torch.stack((want.amin((1, 2)), want.amax((1, 2)))))
        wide = want.double()
        sums = torch.stack((wide.sum((1, 2)), (wide * wide).sum((1, 2))))
        torch.testing.assert_close(moments.sums, sums, rtol=STATISTICS_ERROR, atol=1e-9)
        assert torch.equal(run(c, found, residual=residual), want + residual), name
        taken = residual.clone()
        made = run(c, found, residual=taken, in_place=True)
        assert made is taken and torch.equal(made, want + residual), name


@pytest.mark.parametrize("channels", [224, 228, 352])
@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_are_exact_where_all_products_are_as_large_as_they_can_be(
    channels: int, sign: int
) -> None:
    x, g = torch.full((1, 24, 24, channels), -1.0), torch.Generator().manual_seed(channels)
    weight = torch.full((17, channels, 3, 3), sign * 128 - (sign > 0), dtype=torch.int8)
    x[:, ::9, ::8] = -torch.rand(1, 3, 3, channels, generator=g)
    c = Case(x, weight, torch.ones(17), torch.zeros(17), 1, (1, 1, 1, 1), False)
    for name in sets():
        binding.select_isa(name)
        found = native.map_codes(x)
        want = oracle(c, found.plain.float(), found.scale, found.zero_point)
        assert torch.equal(run(c, found), want), name


@pytest.mark.parametrize("kind", ["3x3", "up", "down"])
def test_rows_so_long_that_strips_have_four_are_those_of_the_portable_kernels(kind: str) -> None:
    c = case(kind, 1, (5, 640), (320, 3))
    made = {}
    for name in sets():
        binding.select_isa(name)
        moments = native.new_moments(1, 3)
        made[name] = (run(c, native.map_codes(c.x), moments=moments), *moments)
    for name, found in made.items():
        assert all(map(torch.equal, found, made["portable"])), name


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from(SIDES),
    st.sampled_from([(3, 1), (36, 4), (64, 32), (24, 24), (5, 5)]),
    st.booleans(),
    st.sampled_from([0.0, 30.0]),
)
def test_codes_of_a_norm_are_those_of_the_reference(
    images: int, side: tuple[int, int], channels: tuple[int, int], silu: bool, offset: float
) -> None:
    """To the bit, the moments from a pass of their own or from the convolution before."""
    width, groups = channels
    g = torch.Generator().manual_seed(images)
    x = torch.randn(images, *side, width, generator=g) * 2 + offset
    norm = native.Norm(groups, torch.randn(width, generator=g), torch.randn(width, generator=g))
    want = reference.norm_codes(x, NormRule(*norm, silu), "")
    wide = x.double()
    moments = native.Moments(
        torch.stack((wide.sum((1, 2)), (wide * wide).sum((1, 2)))),
        torch.stack((x.amin((1, 2)), x.amax((1, 2)))),
    )
    for name in sets():
        binding.select_isa(name)
        for known in (None, moments):
            found = native.map_codes(x, norm, silu=silu, moments=known)
            assert torch.equal(found.scale, want.scale), name
            assert torch.equal(found.zero_point, want.zero_point)
            assert torch.equal(found.plain, want.codes), name


def test_the_reference_computes_silu_and_the_norm_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(-200, 100, 4001)
    assert (reference.silu(x) - F.silu(x.double())).abs().max() < SILU_ERROR
    x = torch.randn(2, 9, 7, 64, generator=g) * 3 + 2
    weight, bias = torch.randn(2, 64, generator=g)
    found = reference.norm_codes(x, NormRule(32, weight, bias, 1e-6, True), "")
    y = F.silu(
        F.group_norm(x.double().permute(0, 3, 1, 2), 32, weight.double(), bias.double(), 1e-6)
    )
    steps = (y.permute(0, 2, 3, 1) / found.scale.view(-1, 1, 1, 1)).round()
    off = (found.codes - found.zero_point.view(-1, 1, 1, 1) - steps).abs()
    # At the border of two codes rounding decides.
    assert off.max() <= 1 and off.mean() < BORDER_CASES


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(list(KINDS)),
    st.integers(2, 5),
    st.integers(1, 3),
    st.sampled_from([(5, 70), (37, 20)]),
)
def test_bits_do_not_depend_on_batch_or_threads(
    kind: str, images: int, threads: int, channels: tuple[int, int]
) -> None:
    c = case(kind, images, (33, 17), channels)
    norm = native.Norm(1, torch.ones(channels[0]), torch.zeros(channels[0]))

    def both(x: Tensor) -> tuple[Tensor, ...]:
        moments = native.new_moments(len(x), channels[1])
        found = native.map_codes(x, norm, silu=True)
        return found.plain, run(c, found, moments=moments), moments.sums.transpose(0, 1)

    alone = [both(part) for part in c.x.split(1)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = both(c.x)
    finally:
        torch.set_num_threads(before)
    for got, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts))


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_a_constant_map_and_one_of_zeros_come_back(value: float) -> None:
    x = torch.full((1, 3, 5, 7), value)
    found = native.map_codes(x)
    back = (found.plain.float() - found.zero_point) * found.scale
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_map_that_is_not_finite_is_refused_by_the_name_of_its_layer(bad: float) -> None:
    x = torch.ones(3, 4, 5, 6)
    x[1, 2, 3, 4] = bad
    with pytest.raises(NonFiniteError, match="layer up: input holds NaN or infinity"):
        native.map_codes(x, layer="up")


def test_wrong_tensors_are_refused_before_c_sees_them() -> None:
    c = case("3x3", 1, (4, 4), (5, 6))
    found = native.map_codes(c.x)
    with pytest.raises(InputError, match="a map of 5 channels, expected 4"):
        native.convolution(found, native.pack(c.weight[:, :4], c.scale))
    with pytest.raises(InputError, match="residual of a convolution"):
        run(c, found, residual=torch.zeros(1, 4, 4, 5))
    with pytest.raises(InputError, match="moments"):
        run(c, found, moments=native.new_moments(1, 5))
    with pytest.raises(InputError, match="5 channels"):
        native.map_codes(c.x, native.Norm(2, torch.ones(5), torch.ones(5)))


def test_what_fits_is_what_the_header_says() -> None:
    around = (1, 1, 1, 1)
    assert native.fits((8, 640, 3, 3), 2, around)
    assert not native.fits((8, 640, 5, 5), 1, around)
    assert not native.fits((8, 640, 3, 3), 1, (2, 2, 2, 2))
    assert not native.fits((8, 640, 3, 3), 3, around)
    assert not native.fits((8, 8000, 3, 3), 1, around)


def test_the_largest_sums_do_not_overflow() -> None:
    """65536 inputs of the largest codes: 65536 x 255 x 127 < 2^31."""
    c = Case(torch.ones(1, 1, 2, 65536), *case("1x1", 1, (1, 1), (1, 2))[1:])
    c = c._replace(weight=torch.full((2, 65536, 1, 1), -127, dtype=torch.int8))
    found = native.map_codes(c.x)
    want = oracle(c, found.plain, found.scale, found.zero_point)
    for name in sets():
        binding.select_isa(name)
        assert torch.equal(run(c, found), want), name


def test_a_map_gets_the_memory_of_one_that_is_gone() -> None:
    room, shape = Room(), (1, 64, 64, 160)
    first = room.empty(shape)
    place, view = first.data_ptr(), first.permute(0, 3, 1, 2)[:, :1]
    del first
    second = room.empty(shape)
    assert second.data_ptr() != place, "a view still holds the first"
    del view
    assert room.empty(shape).data_ptr() == place
    kept = room.nbytes
    larger = room.empty((2, 64, 64, 160))
    assert room.nbytes < kept + larger.nbytes, "outgrown memory stays"
    second.fill_(1.0), larger.fill_(2.0)
    del room
    assert bool((second == 1).all()) and bool((larger == 2).all())
