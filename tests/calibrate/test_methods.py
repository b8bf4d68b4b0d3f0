"""The table of methods: the steps of each name, and a method of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import varptq
from helpers.cli_calls import run as varptq_run
from helpers.cli_calls import succeed
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import center
from varptq.calibrate.methods import METHODS, Method, Step
from varptq.calibrate.quantize import quantize
from varptq.calibrate.reconstruct import reconstruct
from varptq.calibrate.resample import resample
from varptq.calibrate.run import Run
from varptq.calibrate.smoothing import smooth
from varptq.calibrate.theta import choose_theta
from varptq.calibrate.tune import tune
from varptq.errors import ConfigError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.find import quant_linears
from varptq.work import Piece, Work

W4A4 = QuantConfig.preset("w4a4+paper")
CONFIG = CalibrationConfig(num_samples=3, steps=2, theta_samples=1, theta_grid=50)
SHIFTED = (choose_theta, reconstruct, choose_theta, tune)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("rtn", (smooth, center, tune)),
        ("gptq", (smooth, center, reconstruct, tune)),
        ("brecq", (smooth, center, reconstruct, tune)),
        ("sas", (resample, smooth, center, *SHIFTED)),
        ("sas+shift+resample", (resample, smooth, center, *SHIFTED)),
        ("brecq+shift", (smooth, center, *SHIFTED)),
        ("brecq+resample", (resample, smooth, center, reconstruct, tune)),
        ("rtn+shift", (smooth, center, choose_theta, tune)),
        ("rtn+reconstruct", (smooth, center, reconstruct, tune)),
        ("rtn+shift+reconstruct", (smooth, center, *SHIFTED)),
        ("rtn+reconstruct+shift+resample", (resample, smooth, center, *SHIFTED)),
    ],
)
def test_the_steps_of_a_name(name: str, steps: tuple[Step, ...]) -> None:
    method = Method.parse(name)
    assert method.steps == steps
    assert method.shift == (choose_theta in steps)
    assert method.rounding == ("gptq" if name == "gptq" else None)


def test_the_page_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([a-z, ]+) \|$", page, re.MULTILINE)
    steps = {name: [s.__name__.replace("_", " ") for s in m.steps] for name, m in METHODS.items()}
    assert {name: text.split(", ") for name, text in rows} == steps


@pytest.mark.parametrize("name", ["", "SAS", "awq", "sas+", "+shift", "rtn+litevar", "rtn shift"])
def test_unknown_methods_list_the_known(tiny: Pipeline, name: str) -> None:
    message = r"unknown; methods are rtn, gptq, brecq, sas, each with any of \+reconstruct, \+shift"
    with pytest.raises(ConfigError, match=message) as caught:
        quantize(tiny, W4A4, method=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["brecq+shift", "brecq+resample", "rtn+shift"])
def test_single_parts_switch_on(tiny: Pipeline, method: str) -> None:
    report = quantize(tiny, W4A4, method=method, calibration=CONFIG).report
    keys = {"brecq": {"units"}, "rtn": set[str](), "shift": {"theta"}, "resample": {"resampling"}}
    assert set(report) == set[str]().union(*(keys[part] for part in method.split("+")))


def round_biases(run: Run) -> None:
    """A step of the test's own: biases in eighths; the largest change is reported."""
    layers = quant_linears(run.quantized)
    biases = {name: layer.bias for name, layer in layers.items() if layer.bias is not None}
    largest = 0.0
    for name, bias in biases.items():
        rounded = (bias * 8).round() / 8
        largest = max(largest, float((rounded - bias).abs().max()))
        layers[name].bias = nn.Parameter(rounded, requires_grad=False)
    run.report["biases"] = {"largest": largest, "images": len(run.samples.prompts)}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(METHODS, "eighths", Method((smooth, center, round_biases), "in eighths"))
    return "eighths"


def in_eighths(pipe: Pipeline) -> bool:
    biases = [layer.bias for layer in quant_linears(pipe.var).values() if layer.bias is not None]
    return bool(biases) and all(torch.equal(bias * 8, (bias * 8).round()) for bias in biases)


def test_a_method_of_ones_own(tiny: Pipeline, own: str) -> None:
    made = quantize(tiny, W4A4, method=own, calibration=CONFIG)
    assert made.method == own and made.report["biases"]["images"] == CONFIG.num_samples
    assert 0 < made.report["biases"]["largest"] <= 1 / 16
    assert in_eighths(made) and not in_eighths(tiny)
    shifted = quantize(tiny, W4A4, method=f"{own}+shift", calibration=CONFIG)
    assert set(shifted.report) == {"biases", "theta"} and in_eighths(shifted)


@pytest.mark.slow
def test_its_name_is_offered_and_taken_by_the_command_line(own: str, tmp_path: Path) -> None:
    assert own in succeed("quantize", "--help").out
    words = ("quantize", "--random", "demo", "--samples", 2, "--out", tmp_path / "made")
    succeed(*words, "--method", f"{own}+resample")
    made = varptq.load(tmp_path / "made", runtime="simulated")
    assert made.method == f"{own}+resample" and set(made.report) == {"biases", "resampling"}
    assert in_eighths(made)
    ran = varptq_run(*words, "--method", "quarters")
    assert ran.code == 2 and "methods are rtn, gptq, brecq, sas, eighths, each" in ran.err


def test_a_step_listed_twice_does_its_work_twice(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time does not find what the first one left there."""
    steps = (choose_theta, choose_theta, reconstruct, reconstruct)
    monkeypatch.setitem(METHODS, "twice", Method(steps))
    with Work(tmp_path / "work") as work:
        quantize(tiny, W4A4, method="twice", calibration=CONFIG, work=work)
        names = {path.stem for path in (tmp_path / "work").iterdir()}
    assert {"theta", "theta-2", "unit-head", "unit-2-head"} <= names


def test_a_result_of_a_step_is_made_once(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def measure(run: Run) -> None:
        def make() -> Piece:
            made.append("made")
            return Piece(facts={"seed": run.seed})

        run.report["measured"] = run.once("measured", make).facts

    monkeypatch.setitem(METHODS, "measured", Method((measure,)))
    for _ in range(2):
        with Work(tmp_path / "work") as work:
            result = quantize(tiny, W4A4, method="measured", seed=3, work=work)
        assert result.report == {"measured": {"seed": 3}} and made == ["made"]


def test_resampling_comes_before_the_set_is_used(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "late", Method((choose_theta, resample)))
    with pytest.raises(ConfigError, match=r"step resample: .* put resample before the steps"):
        quantize(tiny, W4A4, method="late", calibration=CONFIG)
