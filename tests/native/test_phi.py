"""The native token map: against float64, with no more error than torch's, and its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from varptq.models.seams import Phi
from varptq.native import binding

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason() or "built"),
]

native = pytest.importorskip("varptq.native.phi")

# One sum of 9 C terms in sequence against torch's blocked ones; C = 32 gives 288 terms.
ERROR_OVER_TORCH = 4
ONE_ROUNDING = 2e-7


def case(seed: int, batch: int, channels: int, side: int) -> tuple[Phi, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    phi = Phi(channels)
    assert isinstance(phi.bias, nn.Parameter)
    with torch.no_grad():
        phi.weight.normal_(0.0, (9 * channels) ** -0.5, generator=g)
        phi.bias.normal_(generator=g)
    f_hat, h = torch.randn(2, batch, channels, side, side, generator=g)
    return phi, f_hat, h


def run(phi: Phi, f_hat: Tensor, h: Tensor) -> Tensor:
    return native.add_phi(f_hat, h, phi.weight, phi.bias)


@pytest.mark.parametrize(
    ("channels", "side"), [(1, 1), (3, 5), (8, 16), (32, 16), (5, 17), (4, 33)]
)
def test_the_sum_is_that_of_float64(channels: int, side: int) -> None:
    phi, f_hat, h = case(side, 2, channels, side)
    got = run(phi, f_hat, h)
    with torch.no_grad():
        from_torch = f_hat + phi(h)
        exact = f_hat.double() + phi.double()(h.double())
    limit = ERROR_OVER_TORCH * (from_torch - exact).abs().max() + ONE_ROUNDING
    assert (got - exact).abs().max() < limit


@given(
    batch=st.integers(1, 9),
    threads=st.integers(1, 3),
    side=st.sampled_from([1, 3, 16, 17]),
    channels=st.sampled_from([1, 6, 32]),
)
@settings(max_examples=20, deadline=None)
def test_bits_do_not_depend_on_batch_threads_or_instruction_set(
    batch: int, threads: int, side: int, channels: int
) -> None:
    phi, f_hat, h = case(batch, batch, channels, side)
    want = torch.cat([run(phi, a, b) for a, b in zip(f_hat.split(1), h.split(1), strict=True)])
    before, isa = torch.get_num_threads(), binding.isa()
    torch.set_num_threads(threads)
    try:
        for name in binding.features():
            assert binding.select_isa(name)
            assert torch.equal(run(phi, f_hat, h), want)
    finally:
        torch.set_num_threads(before)
        binding.select_isa(isa)
