"""Learned rounding against the reference code: grid, alpha, soft and hard weights, gradient,
regularizer, beta.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from golden.conftest import Golden
from varptq.quant import adaround
from varptq.quant.affine import Grid, affine_codes, affine_grid, affine_values, to_groups

ATOL = 1e-6
# alpha passes a logarithm, h and its gradient a sigmoid.
ATOL_LOG = 1e-5
GROUPS = {"channel": None, "group128": 128}
SCHEDULES = {
    "released_5000": (5000, 20.0, 2.0, 0.0),
    "brecq_5000": (5000, 20.0, 2.0, 0.2),
    "default_1000": (1000, 10.0, 2.0, 0.2),
}


@pytest.fixture(scope="module")
def arrays(golden: Golden) -> dict[str, np.ndarray]:
    return golden.npz("c_adaround.npz")


def settings(arrays: dict[str, np.ndarray], last: str) -> list[tuple[str, int]]:
    """(kind, bits) of the settings that have an array `last`."""
    keys = [key.split(".") for key in arrays if key.endswith(f".{last}")]
    return [(kind, int(bits[1:])) for kind, bits, _ in keys]


def case(arrays: dict[str, np.ndarray], kind: str, num_bits: int) -> tuple[Tensor, Grid]:
    rows = to_groups(torch.from_numpy(arrays["weight"]), GROUPS[kind])
    return rows, affine_grid(rows, num_bits, -1, "min_max_clamped")


def assert_close(found: Tensor, expected: np.ndarray, atol: float = ATOL) -> None:
    torch.testing.assert_close(
        found.detach().reshape(expected.shape), torch.from_numpy(expected), rtol=1e-6, atol=atol
    )


def test_start(arrays: dict[str, np.ndarray]) -> None:
    cases = settings(arrays, "alpha0")
    assert cases
    for kind, num_bits in cases:
        key = f"{kind}.b{num_bits}"
        rows, grid = case(arrays, kind, num_bits)
        assert_close(grid.scale, arrays[f"{key}.delta"])
        assert_close(grid.zero_point, arrays[f"{key}.zero_point"])
        nearest = affine_values(affine_codes(rows, grid, num_bits), grid)
        assert_close(nearest, arrays[f"{key}.nearest"])
        alpha = adaround.init_alpha(rows, grid)
        assert_close(alpha, arrays[f"{key}.alpha0"], ATOL_LOG)
        floor = adaround.floor_codes(rows, grid)
        soft = affine_values(adaround.soft_codes(floor, alpha, num_bits), grid)
        assert_close(soft, arrays[f"{key}.soft0"])
        hard = affine_values(adaround.hard_codes(floor, alpha, num_bits), grid)
        assert_close(hard, arrays[f"{key}.hard0"])


def test_learned(arrays: dict[str, np.ndarray]) -> None:
    cases = settings(arrays, "alpha1")
    assert cases
    for kind, num_bits in cases:
        key = f"{kind}.b{num_bits}"
        rows, grid = case(arrays, kind, num_bits)
        alpha = torch.from_numpy(arrays[f"{key}.alpha1"]).requires_grad_()
        floor = adaround.floor_codes(rows, grid)
        assert_close(adaround.soft_target(alpha), arrays[f"{key}.h1"])
        soft = affine_values(adaround.soft_codes(floor, alpha, num_bits), grid)
        assert_close(soft, arrays[f"{key}.soft1"])
        hard = affine_values(adaround.hard_codes(floor, alpha, num_bits), grid)
        assert_close(hard, arrays[f"{key}.hard1"])
        (soft.flatten(1) * torch.from_numpy(arrays[f"{key}.gout"])).sum().backward()
        assert alpha.grad is not None
        assert_close(alpha.grad, arrays[f"{key}.galpha1"], ATOL_LOG)
        for beta, expected in zip(arrays["betas"], arrays[f"{key}.reg1"], strict=True):
            found = float(adaround.regularizer(alpha.detach(), float(beta)))
            assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_linear_beta(arrays: dict[str, np.ndarray], name: str) -> None:
    steps, start, end, warmup = SCHEDULES[name]
    found = [adaround.linear_beta(int(t), steps, start, end, warmup) for t in arrays["decay_t"]]
    np.testing.assert_allclose(found, arrays[f"decay_{name}"], rtol=1e-12)
