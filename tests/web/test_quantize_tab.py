"""What the tab Quantize asks for and says, without a page."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.methods import METHODS, Method
from varptq.calibrate.quantize import quantize
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.web.losses import Losses
from varptq.web.quantize_tab import DEFAULT, Request, method_choices, rows_of, suggested_name


@pytest.mark.parametrize(
    ("config", "calibration", "steps", "method"),
    [
        ("w8a8", "fast", 0, "gptq"),
        ("w8a8", "standard", 0, "brecq"),
        ("w8a8", "fast", 7, "gptq"),
        ("w8a8", "default", 7, "brecq"),
        ("w4a4+paper", "fast", 0, "sas"),
    ],
)
def test_the_default_method_is_that_of_the_library(
    config: str, calibration: str, steps: int, method: str
) -> None:
    for unsaid in (DEFAULT, None):
        request = Request.checked(config, unsaid, calibration, 0, steps, 0, "x", False)
        assert request.method == method
    assert Request.checked(config, "rtn", calibration, 0, steps, 0, "x", False).method == "rtn"
    assert suggested_name("demo", config, DEFAULT) == f"demo-{config}"


def test_a_closed_form_has_a_curve_per_unit_and_says_what_it_runs_on(
    make_tiny: Callable[..., Pipeline],
) -> None:
    settings = CalibrationConfig(num_samples=2)
    losses = Losses(Method.parse("gptq").settle(settings).steps_per_unit)

    def listen(stage: str, done: int, total: int, info: str = "") -> None:
        losses.note(stage, done, info)

    made = quantize(
        make_tiny(depth=1), QuantConfig.preset("w8a8"), calibration=settings, progress=listen
    )
    assert made.method == "gptq"
    curves = losses.curves()
    assert curves.keys() == {unit["name"] for unit in made.report["units"]}
    assert all([step for step, _ in points] == [0, 1] for points in curves.values())
    assert ("Runs on", "cpu") in rows_of(made, 1.0)


def test_methods_are_offered_as_the_table_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "own", Method((), "one of my own"))
    offered = method_choices()
    assert list(offered) == [DEFAULT, *METHODS] and all(offered.values())
    assert offered["own"] == "one of my own"
