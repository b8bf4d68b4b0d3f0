"""What the tab Quantize asks for and says, without a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import varptq
from helpers.infinity_states import features
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.methods import METHODS, Method
from varptq.calibrate.quantize import quantize
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.models.texts import TextPrompts
from varptq.quant.config import QuantConfig
from varptq.web.files import prompts
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


def test_prompts_are_typed_or_in_a_file(tmp_path: Path) -> None:
    lines, held = tmp_path / "lines.txt", tmp_path / "held.safetensors"
    lines.write_text("a hen\ntwo dogs\n")
    varptq.save_features(held, TextPrompts.of(features(2, 1)))
    assert prompts(None, "") is prompts(None, " \n ") is prompts("", None) is None
    assert prompts(None, "a hen\r\n\n  two dogs \n") == ["a hen", "two dogs"]
    assert prompts(str(lines), "") == ["a hen", "two dogs"]
    read = prompts(str(held), None)
    assert isinstance(read, TextPrompts) and len(read) == 2
    settings = ("w8a8", "rtn", "fast", 0, 0, 0, "x", False)
    assert Request.checked(*settings, str(lines), "").prompts == ["a hen", "two dogs"]
    for path, typed, says in (
        (lines, "a hen", r"^prompts: both typed and in lines\.txt; remove"),
        (tmp_path / "empty.txt", "", r"^empty\.txt, line 2: empty"),
        (tmp_path / "damaged.safetensors", "", r"^damaged\.safetensors"),
        (tmp_path / "gone.txt", "", r"^gone\.txt: cannot be read"),
    ):
        (tmp_path / "empty.txt").write_text("a hen\n\n")
        (tmp_path / "damaged.safetensors").write_text("x")
        with pytest.raises(InputError, match=says) as refused:
            prompts(str(path), typed)
        assert str(tmp_path) not in str(refused.value)
