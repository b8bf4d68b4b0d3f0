"""What the benchmark of calibration compares is one computation, done in two ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.common import calibration_steps as steps
from varptq.calibrate.reconstruct import unit_layers
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.quant import straight_through
from varptq.quant.config import QuantConfig

# Float64 but for the loss, so gradients carry the rounding of float32.
ROUNDING = 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w4a4+paper", "w6a6+paper", "w4a4", "w4a4+renorm+v6"])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_one_pass_and_the_loop_over_scales_have_the_same_gradients(
    make_tiny: Callable[..., Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    l2_norm: bool,
) -> None:
    """All scales in one pass with written gradients, and scale by scale with derived ones."""
    monkeypatch.setattr(steps, "CONFIG", preset)
    pipe = make_tiny(l2_norm=l2_norm, scales=Scales((1, 2, 3, 5)))
    pipe.var.double()
    for name in steps.KINDS.values():
        assert steps.apart(pipe, name, samples=2) < ROUNDING, name


def test_plain_gradients_are_those_of_other_code(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside `plain_gradients` no written one is used, and after it they are again."""
    unit = steps.unit_of(tiny, QuantConfig.preset("w4a4+paper"), 1, "blocks.1.ffn")
    alphas = [layer.start_rounding(hard=True).alpha for layer in unit_layers(unit)]
    rows = torch.arange(2)

    def refuse(*_: object) -> None:
        raise AssertionError("a written gradient")

    for function in vars(straight_through).values():
        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            monkeypatch.setattr(function, "backward", staticmethod(refuse))
    with steps.plain_gradients():
        steps.one_step(unit, alphas, rows, fused=False)
    with pytest.raises(AssertionError, match="a written gradient"):
        steps.one_step(unit, alphas, rows, fused=True)
