"""Every quantizer of the method against the reference code, at 2 to 8 bits.

The arrays of percentile ranges, momentum updates and convolutions belong to code paths that the
released settings never reach; there is no such function here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from golden.conftest import Golden
from varptq.quant.affine import (
    SCALE_FLOOR,
    Grid,
    affine_codes,
    affine_fake,
    affine_grid,
    affine_values,
    from_groups,
    to_groups,
)
from varptq.quant.log2 import log2_fake
from varptq.quant.shift_sum import shift_sum_fake
from varptq.quant.sign_split import sign_split_fake, sign_split_grid
from varptq.quant.uniform import row_max

ALL_BITS = range(2, 9)
# Equal up to float32 rounding, relative to the largest value of a row.
RELATIVE = 1e-6

# kind: input, group size, reduced dimensions, range rule
AFFINE = {
    "uniform_max": ("in_w", None, -1, "min_max_clamped"),
    "uniform_max_tensor": ("in_t", None, (-2, -1), "min_max_clamped"),
    "group128": ("in_w", 128, -1, "min_max_clamped"),
    "token_x3": ("in_x3", None, -1, "min_max"),
    "token_x2": ("in_x2", None, -1, "min_max"),
    "token_q": ("in_q", None, -1, "min_max"),
    "token_kT": ("in_kT", None, -1, "min_max"),
    "group64_x3": ("in_x3", 64, -1, "min_max"),
    "group64_x2": ("in_x2", 64, -1, "min_max"),
    "group64_q": ("in_q", 64, -1, "min_max"),
    # The reference cuts 64 rows of the transposed keys: with head width 64 that is one range per
    # token.
    "group64_kT": ("in_kT", None, -2, "min_max"),
}


@pytest.fixture(scope="module")
def arrays(golden: Golden) -> dict[str, Tensor]:
    data = golden.npz("b_quantizers.npz")
    return {k: torch.from_numpy(v) for k, v in data.items() if v.dtype.kind in "fi"}


def assert_rows_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    largest = expected.abs().amax(-1, keepdim=True)
    assert bool(((found - expected).abs() <= RELATIVE * largest).all())


def assert_grid_equal(grid: Grid, arrays: dict[str, Tensor], key: str) -> None:
    delta, zero_point = arrays[f"{key}.delta"], arrays[f"{key}.zero_point"]
    assert_rows_equal(grid.scale.reshape(delta.shape), delta)
    torch.testing.assert_close(grid.zero_point.reshape(delta.shape), zero_point, rtol=0, atol=0)


@pytest.mark.parametrize("num_bits", ALL_BITS)
@pytest.mark.parametrize("kind", AFFINE)
def test_affine(arrays: dict[str, Tensor], kind: str, num_bits: int) -> None:
    name, group_size, dims, rule = AFFINE[kind]
    x = to_groups(arrays[name], group_size)
    grid = affine_grid(x, num_bits, dims, rule)
    assert_grid_equal(grid, arrays, f"{kind}.b{num_bits}")
    values = affine_values(affine_codes(x, grid, num_bits), grid)
    assert torch.equal(values, affine_fake(x, num_bits, dims, rule))
    values = from_groups(values) if group_size else values
    assert_rows_equal(values, arrays[f"{kind}.b{num_bits}.out"])


@pytest.mark.parametrize("num_bits", ALL_BITS)
@pytest.mark.parametrize(("kind", "group_size"), [("token_fc2", None), ("group64_fc2", 64)])
def test_sign_split(
    arrays: dict[str, Tensor], kind: str, group_size: int | None, num_bits: int
) -> None:
    key = f"{kind}.b{num_bits}"
    x = to_groups(arrays["in_x3"], group_size)
    grid = sign_split_grid(x, num_bits)
    assert_rows_equal(grid.negative, arrays[f"{key}.delta_neg"])
    assert_rows_equal(grid.positive, arrays[f"{key}.delta_pos"])
    values = sign_split_fake(x, num_bits)
    assert_rows_equal(from_groups(values) if group_size else values, arrays[f"{key}.out"])


@pytest.mark.parametrize("num_bits", ALL_BITS)
def test_log2(arrays: dict[str, Tensor], num_bits: int) -> None:
    assert_rows_equal(row_max(arrays["in_p"]), arrays[f"log2.b{num_bits}.delta"])
    values = log2_fake(arrays["in_p"], num_bits)
    assert_rows_equal(values, arrays[f"log2.b{num_bits}.out"])


@pytest.mark.parametrize("num_bits", ALL_BITS)
def test_shift_and_sum(arrays: dict[str, Tensor], num_bits: int) -> None:
    key, v, order = f"shift_and_sum.b{num_bits}", arrays["in_v"], arrays["in_order"]
    grid = affine_grid(v, num_bits, (-2, -1), "min_max")
    assert_grid_equal(grid, arrays, key)
    assert_rows_equal(shift_sum_fake(v, grid, order, num_bits), arrays[f"{key}.out"])
    plain = shift_sum_fake(v, grid, torch.zeros_like(order), num_bits)
    assert_rows_equal(plain, arrays[f"{key}.out_order0"])


@pytest.mark.parametrize("num_bits", ALL_BITS)
@pytest.mark.parametrize("name", ["in_w", "in_x2"])
def test_with_zero_differs_only_in_rows_whose_range_misses_zero(
    arrays: dict[str, Tensor], name: str, num_bits: int
) -> None:
    """There it trades a step of max - min for one of max: the error is bounded by a step of the
    wider range.

    Released weights clamp the zero point instead and lose such a row altogether; released inputs
    let the zero point leave the codes and keep the finer step.
    """
    x = arrays[name]
    rule = "min_max_clamped" if name == "in_w" else "min_max"
    kind = "uniform_max" if name == "in_w" else "token_x2"
    released, ours = arrays[f"{kind}.b{num_bits}.out"], affine_fake(x, num_bits)
    low, high = x.amin(-1), x.amax(-1)
    has_zero = (low <= 0) & (high >= 0)
    # The released code has a least step, which ours does without.
    floored = arrays[f"{kind}.b{num_bits}.delta"].reshape(low.shape) <= np.float32(SCALE_FLOOR)
    assert int(floored.sum()) < len(low)
    assert_rows_equal(ours[has_zero & ~floored], released[has_zero & ~floored])
    errors = [(values - x).abs().amax(-1)[has_zero & floored] for values in (ours, released)]
    assert bool((errors[0] <= errors[1]).all())

    misses = ~has_zero
    assert int(misses.sum()) > 0
    step = torch.maximum(low.abs(), high.abs()) / (2**num_bits - 1)
    error = (ours - x).abs().amax(-1)
    assert bool((error <= 0.5001 * step.clamp(min=SCALE_FLOOR))[misses].all())
    if rule == "min_max_clamped":
        released_error = (released - x).abs().amax(-1)
        worst = (released_error / high.abs().clamp(min=SCALE_FLOOR))[misses].max()
        assert float(worst) > 0.9, "a released row of one sign collapses to almost nothing"


def test_kinds_cover_the_ends(golden: Golden) -> None:
    """The rows this file relies on to meet ties, constants, denormals and huge values are there."""
    kinds = set(np.asarray(golden.npz("b_quantizers.npz")["kinds"]).tolist())
    assert {"const_pos", "zeros", "huge", "denormal", "half_grid", "pos_only"} <= kinds
