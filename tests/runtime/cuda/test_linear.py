"""Triton's quantizer and integer product against the pure functions and exact arithmetic."""

import pytest
import torch
from torch.nn import functional as F

from varptq.quant.affine import Grid, affine_codes, affine_grid, affine_values, to_groups
from varptq.quant.sign_split import sign_split_codes, sign_split_fake, sign_split_grid
from varptq.quant.transforms import hadamard, signs
from varptq.runtime.cuda.gemm import CudaWeight, linear, pack
from varptq.runtime.cuda.kernels import CudaKernels
from varptq.runtime.cuda.quantize import quantize
from varptq.runtime.kernels import InputRule, Weight

# width, group, bits, rotation: whole rows of no round size, groups, and both edges of the widths.
INPUTS = [
    (256, 64, 4, 128),
    (256, 256, 8, 0),
    (48, 48, 6, 16),
    (384, 64, 2, 128),
    (130, 130, 8, 0),
    (37, 37, 7, 0),
    (192, 64, 4, 64),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "group", "bits", "block"), INPUTS)
def test_codes_grids_and_sums_are_exact(
    width: int, group: int, bits: int, block: int, device: str
) -> None:
    x = random(7, width)
    x[2], x[3] = x[2].abs(), -x[3].abs()
    x[4] = 0.0
    x[5] *= 1e-12  # a step has no floor
    x[6] *= 1e30
    offset = 128 if bits == 8 else 0
    turned = hadamard(x, block) if block else x
    rows = to_groups(turned, group)
    grid = affine_grid(rows, bits)
    codes = affine_codes(rows, grid, bits)
    found = quantize(
        x.to(device),
        num_bits=bits,
        group=group,
        segment=group,
        signs=signs(block).to(device) if block else None,
    )
    assert torch.equal(found.codes.cpu().int() + offset, codes.flatten(1).int())
    assert torch.equal(found.scale.cpu(), grid.scale.squeeze(-1))
    assert torch.equal(found.zero_point.cpu() + offset, grid.zero_point.squeeze(-1).int())
    assert torch.equal(found.sum.cpu(), (codes - offset).sum(-1).int())


@pytest.mark.parametrize(("width", "group", "bits"), [(256, 64, 4), (130, 130, 8), (48, 48, 6)])
def test_sign_split_rows_are_pairs(width: int, group: int, bits: int, device: str) -> None:
    x = random(5, width)
    rows = to_groups(x, group)
    grid = sign_split_grid(rows, bits)
    codes = sign_split_codes(rows, grid, bits).flatten(1).int()
    found = quantize(x.to(device), num_bits=bits, group=group, segment=group, sign_split=True)
    positive, negative = found.codes.cpu()[0::2].int(), found.codes.cpu()[1::2].int()
    assert torch.equal(positive - negative, codes)
    assert torch.equal(found.scale.cpu()[0::2], grid.positive.squeeze(-1))
    assert torch.equal(found.scale.cpu()[1::2], -grid.negative.squeeze(-1))


def test_prologues(device: str) -> None:
    """Norm with modulation of its image, means of its token, and GELU: codes move by one at most
    where a float lies on the edge of two."""
    x, gain, shift, means = random(6, 256), random(2, 256), random(2, 256), random(4, 256, seed=1)
    row = torch.tensor([3, 0, 2], dtype=torch.int32)
    normed = F.layer_norm(x, (256,), eps=1e-6) * (1 + gain.repeat_interleave(3, 0))
    normed = normed + shift.repeat_interleave(3, 0) - means[row.long().repeat(2)]
    gelu = F.gelu(x, approximate="tanh")
    options = {"num_bits": 8, "group": 256, "segment": 256}
    first = quantize(
        x.to(device),
        gain=gain.to(device),
        shift=shift.to(device),
        means=means.to(device),
        mean_row=row.to(device),
        rows_per_image=3,
        **options,
    )
    second = quantize(x.to(device), gelu=True, **options)
    for found, expected in ((first, normed), (second, gelu)):
        codes = affine_codes(expected, affine_grid(expected, 8), 8)
        difference = (found.codes.cpu().float() + 128 - codes).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01


# rows, inputs, outputs, group of activations and of weights, bits of both.
PRODUCTS = [
    (5, 256, 70, 64, 128, 4, 4),
    (18, 256, 33, 256, 256, 8, 8),
    (3, 256, 40, 256, 128, 8, 4),
    (7, 48, 20, 48, 48, 6, 6),
    (3, 130, 17, 130, 130, 8, 8),
    (2, 256, 5, 64, 256, 4, 8),
    (1, 37, 3, 37, 37, 2, 3),
]


def weight_of(outputs: int, inputs: int, group: int, bits: int) -> tuple[torch.Tensor, Grid]:
    rows = to_groups(random(outputs, inputs, seed=2), group)
    grid = affine_grid(rows, bits)
    return affine_codes(rows, grid, bits), grid


def packed(codes: torch.Tensor, grid: Grid, bits: int, segment: int, device: str) -> CudaWeight:
    flat = codes.flatten(1).to(torch.uint8).to(device)
    scale, zero = (x.squeeze(-1).to(device) for x in grid)
    return pack(Weight(flat, scale, zero, bits), segment)


@pytest.mark.parametrize("case", PRODUCTS)
def test_integers_are_exact_and_floats_round(case: tuple[int, ...], device: str) -> None:
    rows, inputs, outputs, row_group, weight_group, row_bits, weight_bits = case
    segment = min(row_group, weight_group)
    x = random(rows, inputs)
    a = quantize(x.to(device), num_bits=row_bits, group=row_group, segment=segment)
    codes, grid = weight_of(outputs, inputs, weight_group, weight_bits)
    w = packed(codes, grid, weight_bits, segment, device)
    cells = to_groups(x, row_group)
    row_grid = affine_grid(cells, row_bits)
    steps = affine_codes(cells, row_grid, row_bits) - row_grid.zero_point
    weight_steps = (codes - grid.zero_point).reshape(outputs, -1, segment).double()
    exact = torch.einsum("mks,nks->mnk", steps.reshape(rows, -1, segment).double(), weight_steps)
    assert torch.equal(linear(a, w, exact=True).cpu().double(), exact)
    bias = random(3, outputs, seed=3)
    row = torch.tensor([2], dtype=torch.int32, device=device)
    y = linear(a, w, bias=bias.to(device), bias_row=row).cpu().double()
    values = (steps * row_grid.scale).reshape(rows, inputs).double()
    weights = affine_values(codes, grid).reshape(outputs, inputs).double()
    torch.testing.assert_close(y, values @ weights.T + bias[2].double(), rtol=1e-5, atol=2e-5)


def test_pairs_add_up(device: str) -> None:
    x = random(6, 128)
    a = quantize(x.to(device), num_bits=4, group=64, segment=64, sign_split=True)
    codes, grid = weight_of(9, 128, 128, 4)
    w = packed(codes, grid, 4, 64, device)
    expected = (
        sign_split_fake(to_groups(x, 64), 4).flatten(1) @ affine_values(codes, grid).flatten(1).T
    )
    torch.testing.assert_close(linear(a, w, pairs=True).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(device: str) -> None:
    x = random(37, 256)
    codes, grid = weight_of(24, 256, 128, 4)
    w = packed(codes, grid, 4, 64, device)
    options = {"num_bits": 4, "group": 64, "segment": 64}
    whole = linear(quantize(x.to(device), **options), w)
    for rows in (slice(0, 1), slice(5, 22), slice(36, 37)):
        assert torch.equal(linear(quantize(x[rows].to(device), **options), w), whole[rows])


@pytest.mark.parametrize(
    ("group", "weight_group", "refused"),
    [(None, None, None), (192, 64, None), (96, None, 96), (64, 96, 96), (None, 48, 48)],
)
def test_groups_that_no_tile_holds_are_refused(
    group: int | None, weight_group: int | None, refused: int | None
) -> None:
    rule = InputRule("fc1", 192, "affine", 4, "with_zero", group, weight_group, True, None)
    said = CudaKernels().refuse_linear(rule)
    assert said == (refused and f"groups of {refused} of 192 inputs, no power of two")
