"""The native quantizer: codes, scales, zero points and sums equal those of varptq.quant, bit for
bit, on every instruction set; prologues agree with torch to float32 rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from varptq.errors import NonFiniteError
from varptq.native import binding
from varptq.native.quantize import Codebook, Norm, quantize
from varptq.quant.affine import affine_codes, affine_grid, to_groups
from varptq.quant.codebook import HALVES, codebook_codes, codebook_grid, entries, reach
from varptq.quant.sign_split import sign_split_codes, sign_split_grid
from varptq.quant.transforms import hadamard

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason()),
]

NAMES = ("portable", "avx2", "avx512vnni", "neon-dotprod")
# LayerNorm and GELU against float64: a few roundings, and an exponential good to 2e-7 per unit.
PROLOGUE_ERROR = 3e-6


def sets() -> list[str]:
    return [name for name in NAMES if binding.select_isa(name)]


def data(m: int, k: int, kind: str, seed: int) -> Tensor:
    """Rows with what makes quantizers differ: one sign, ties, tiny and huge ranges, zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    match kind:
        case "positive":
            return x.abs() + 0.5
        case "negative":
            return -x.abs()
        case "ties":  # a power of two as step, and every value on a half
            x = torch.randint(-15, 16, (m, k), generator=g) / 2
            x[:, 0], x[:, -1] = -3.5, 4.0
            return x
        case "tiny":
            return x * 1e-9
        case "huge":
            return (x * 1e38).clamp(-3e38, 3e38)
        case "zero":
            return x * 0
    return x


KINDS = st.sampled_from(["plain", "positive", "negative", "ties", "tiny", "huge", "zero"])
LAYOUTS = st.sampled_from(
    [(None, 1), (None, 3), (None, 37), (None, 130), (None, 256), (64, 192), (8, 72), (20, 100)]
)


@settings(max_examples=80)
@given(st.sampled_from([1, 3, 9]), LAYOUTS, st.integers(2, 8), KINDS, st.integers(0, 999))
def test_affine_codes_are_those_of_the_reference(
    m: int, layout: tuple[int | None, int], bits: int, kind: str, seed: int
) -> None:
    group, k = layout
    x = data(m, k, kind, seed)
    cut = to_groups(x, group or k)
    grid = affine_grid(cut, bits)
    codes = affine_codes(cut, grid, bits).flatten(1)
    for name in sets():
        binding.select_isa(name)
        rows = quantize(x, num_bits=bits, row_group=group)
        assert torch.equal(rows.plain_codes.float(), codes), name
        assert torch.equal(rows.scale, grid.scale.squeeze(-1))
        assert torch.equal(rows.zero_point.float(), grid.zero_point.squeeze(-1))
        assert torch.equal(rows.sums.float(), codes.unflatten(1, (-1, group or k)).sum(-1))
        assert rows.codes.sum() == rows.plain_codes.sum(), "padding is not zero"


@settings(max_examples=60)
@given(st.sampled_from([1, 3, 9]), LAYOUTS, st.integers(2, 6), KINDS, st.integers(0, 999))
def test_codebook_codes_are_those_of_the_reference(
    m: int, layout: tuple[int | None, int], bits: int, kind: str, seed: int
) -> None:
    """Scales too, so the order of their sums; entries are codes about 128."""
    group, k = layout
    x = data(m, k, kind, seed)
    x[0, : k // 2] *= 2.0**-30
    cut = to_groups(x, group or k)
    grid = codebook_grid(cut, bits)
    found = entries(bits)[codebook_codes(cut, grid, bits).int()].int().flatten(1)
    book = Codebook(HALVES[bits], reach(bits))
    for name in sets():
        binding.select_isa(name)
        rows = quantize(x, num_bits=bits, row_group=group, codebook=book)
        assert torch.equal(rows.scale, grid.scale.squeeze(-1)), name
        assert torch.equal(rows.plain_codes.int() - 128, found), name
        assert bool((rows.zero_point == 128).all()) and rows.num_bits == 8
        assert torch.equal(rows.sums, (found + 128).unflatten(1, (-1, group or k)).sum(-1).int())
        assert rows.codes.sum() == rows.plain_codes.sum(), "padding is not zero"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_numbers_next_to_a_border_of_a_codebook(bits: int) -> None:
    """The floats around those that reach a border have the reference's codes: a core that compares
    with limits must have just these."""
    half = torch.tensor(HALVES[bits], dtype=torch.float32)
    borders = (half[1:] + half[:-1]) / 2
    g = torch.Generator().manual_seed(bits)
    x = torch.randn(200, 512, generator=g)
    x = x / x.abs().amax(-1, keepdim=True) * 1.5
    steps = torch.randint(-3, 4, (len(x), len(borders)), generator=g, dtype=torch.int32)
    for _ in range(8):
        # What is planted moves the start by little, after a few turns by nothing.
        near = borders * codebook_grid(x, bits).start
        x[:, : len(borders)] = (near.view(torch.int32) + steps).view(torch.float32)
    grid = codebook_grid(x, bits)
    moved = (borders * grid.start).view(torch.int32) - x[:, : len(borders)].view(torch.int32)
    assert (moved.abs() <= 3).float().mean() > 0.5, "too few are next to a border"
    found = entries(bits)[codebook_codes(x, grid, bits).int()].int()
    book = Codebook(HALVES[bits], reach(bits))
    for name in sets():
        binding.select_isa(name)
        rows = quantize(x, num_bits=bits, codebook=book)
        assert torch.equal(rows.plain_codes.int() - 128, found), name


@settings(max_examples=40)
@given(st.sampled_from([1, 3]), LAYOUTS, st.integers(2, 8), KINDS, st.integers(0, 999))
def test_sign_split_codes_are_those_of_the_reference(
    m: int, layout: tuple[int | None, int], bits: int, kind: str, seed: int
) -> None:
    group, k = layout
    x = data(m, k, kind, seed)
    cut = to_groups(x, group or k)
    grid = sign_split_grid(cut, bits)
    codes = sign_split_codes(cut, grid, bits).flatten(1)
    for name in sets():
        binding.select_isa(name)
        rows = quantize(x, num_bits=bits, row_group=group, sign_split=True)
        positive, negative = rows.plain_codes[0::2].float(), rows.plain_codes[1::2].float()
        assert torch.equal(positive - negative, codes), name
        assert torch.equal(rows.scale[0::2], grid.positive.squeeze(-1))
        assert torch.equal(rows.scale[1::2], -grid.negative.squeeze(-1))
        assert not rows.zero_point.any()


@pytest.mark.parametrize("block", [2, 4, 8, 16, 32, 64, 128, 1024])
def test_the_rotation_is_that_of_the_reference_to_the_bit(block: int) -> None:
    k = max(block, 3 * block if block < 256 else block)
    x = data(5, k, "plain", block)
    means = data(3, k, "plain", 1)
    token_rows = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32)
    want = hadamard(x - means[token_rows.long()], block)
    grid = affine_grid(want, 4)
    for name in sets():
        binding.select_isa(name)
        rows = quantize(
            *(x,), num_bits=4, means=means, mean_rows=token_rows, hadamard=block, keep_values=True
        )
        assert rows.values is not None
        assert torch.equal(rows.values, want), name
        assert torch.equal(rows.plain_codes.float(), affine_codes(want, grid, 4))


@pytest.mark.parametrize("k", [1, 15, 64, 100, 130, 1024])
def test_norm_and_gelu_agree_with_float64_and_on_all_sets(k: int) -> None:
    x = data(6, k, "plain", k).view(2, 3, k) * 3
    gain, shift = data(2, k, "plain", 1), data(2, k, "plain", 2)
    normal = F.layer_norm(x.double(), (k,), eps=1e-6)
    modulated = normal * (1 + gain.double()[:, None]) + shift.double()[:, None]
    activated = F.gelu(x.double(), approximate="tanh")
    first: list[Tensor] = []
    for name in sets():
        binding.select_isa(name)
        norm = Norm(gain, shift)
        a = quantize(x, num_bits=8, norm=norm, keep_values=True)
        b = quantize(x, num_bits=8, gelu=True, keep_values=True)
        assert a.values is not None and b.values is not None
        scale = modulated.abs().amax() + normal.abs().amax()
        assert (a.values.view(2, 3, k) - modulated).abs().max() < PROLOGUE_ERROR * scale
        assert (b.values.view(2, 3, k) - activated).abs().max() < PROLOGUE_ERROR * x.abs().max()
        first = first or [a.values, b.values]
        assert torch.equal(a.values, first[0]) and torch.equal(b.values, first[1]), name


def test_bfloat16_rows_are_their_float32_values() -> None:
    x = data(3, 130, "plain", 0).bfloat16()
    for name in sets():
        binding.select_isa(name)
        half, full = (quantize(v, num_bits=8) for v in (x, x.float()))
        assert torch.equal(half.codes, full.codes) and torch.equal(half.scale, full.scale), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 36])
def test_nan_and_infinity_are_refused_by_the_layers_name(bad: float, place: int) -> None:
    x = data(5, 37, "plain", 0)
    x[3, place] = bad
    for name in sets():
        binding.select_isa(name)
        with pytest.raises(NonFiniteError, match=r"layer blocks\.0\.fc1: input holds NaN"):
            quantize(x, num_bits=8, layer="blocks.0.fc1")


def test_rows_do_not_depend_on_the_number_of_threads() -> None:
    x = data(67, 130, "plain", 0)
    one = quantize(x, num_bits=8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = quantize(x, num_bits=8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.sums, two.sums)
