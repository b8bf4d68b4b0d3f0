"""Every preset by every method: what an artifact will run on is said before, and is so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import varptq
from helpers.cli_calls import run, succeed
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.methods import METHODS, Method, default_method
from varptq.cli.model_choice import ModelChoice
from varptq.errors import ConfigError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import MAX_STORED, LayerRule, QuantConfig
from varptq.quant.find import quant_mixes
from varptq.quant.pipeline import QuantizedPipeline
from varptq.quant.presets import BEYOND_PAPER, MODIFIERS, NAMES
from varptq.runtime.resolve import ENVIRONMENT, fastest, foreseen

WIDTHS = range(2, 9)
BARE = [f"w{w}a{a}" for w in WIDTHS for a in WIDTHS]
# Methods differ here in whether shift-and-sum is on.
ALL_METHODS = (*METHODS, "rtn+shift", "brecq+shift", None)
# What keeps integers from a preset, by the part of its name that asks for it.
REFUSED = {
    "renorm": "renormalized probabilities",
    "released": "range rule",
}
FEW = CalibrationConfig(num_samples=2, steps=1, theta_samples=1, theta_grid=50)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def one_block(make_tiny: Callable[..., Pipeline]) -> Pipeline:
    return make_tiny(depth=1)


def presets() -> Iterator[tuple[str, str | None]]:
    """(name, why integers cannot execute it, None where they can)."""
    yield from ((name, None) for name in BARE)
    yield from ((f"w{bits}a{bits}+paper", "attention policy 'release'") for bits in WIDTHS)
    yield from ((name, None) for name in NAMES if name != "paper")
    yield "paper", "attention policy 'release'"
    for modifier in MODIFIERS:
        for base in ("w4a4", "w6a6", "w8a8"):
            yield f"{base}+{modifier}", REFUSED.get(modifier)
    whole = "+".join(BEYOND_PAPER)
    yield from ((f"{base}+paper+{whole}", None) for base in ("w4a4", "w8a8"))
    yield "w4a4+paper+token", "probability type 'log2'"
    yield "w4a4+qk8+v8+g32", None


@pytest.mark.slow
def test_every_preset_by_every_method(one_block: Pipeline, counted: Callable[[], None]) -> None:
    for name, why in presets():
        config = QuantConfig.preset(name)
        asked = [method or default_method(config) for method in ALL_METHODS]
        choices = {
            shift: foreseen(one_block.var, config, shift=shift)
            for shift in {Method.parse(method).shift for method in asked}
        }
        for method in asked:
            counted()
            choice = choices[Method.parse(method).shift]
            if why is None:
                assert (choice.runs_on, choice.fallback) == ("cpu", False), (name, method)
            else:
                assert choice.fallback and choice.runs_on.startswith("simulated, because "), name
                assert why in choice.reason, (name, method)


def test_the_orders_are_what_the_core_takes(counted: Callable[[], None]) -> None:
    """Of every width the finest order that fits, and no more; the paper's under its own policy, and
    none of a codebook, which has no finer steps."""
    for bits, finest in zip(WIDTHS, (3, 3, 3, 2, 1, 0, 0), strict=True):
        counted()
        book = QuantConfig.preset(f"w4a{bits}").attention
        assert book is not None and book.max_order == 0
        spec = QuantConfig.preset(f"w4a{bits}+groups").attention
        assert spec is not None and spec.max_order == finest
        assert finest == 0 or (2**bits - 1) << finest <= MAX_STORED
        assert (2**bits - 1) << (finest + 1) > MAX_STORED or finest == 3
        paper = QuantConfig.preset(f"w4a{bits}+paper").attention
        assert paper is not None and paper.max_order == 3


@pytest.mark.parametrize(
    ("name", "settings", "method"),
    [
        ("w4a4", None, "gptq"),
        ("w8a8", CalibrationConfig(num_samples=3), "gptq"),
        ("best", CalibrationConfig.preset("fast"), "gptq"),
        ("w6a6", CalibrationConfig.preset("default"), "gptq"),
        ("w4a8", CalibrationConfig.preset("standard"), "brecq"),
        ("w4a4", CalibrationConfig.preset("max").replace(num_samples=3), "brecq"),
        ("w4a4", CalibrationConfig.preset("released"), "brecq"),
        ("w4a4", CalibrationConfig().replace(steps=5), "brecq"),
        ("w4a4", CalibrationConfig(rounding="nearest"), "brecq"),
        ("w4a4+paper", None, "sas"),
        ("w4a4+paper+litevar", CalibrationConfig.preset("standard"), "sas"),
        ("w4a4+litevar", None, "gptq"),
    ],
)
def test_the_default_method_follows_the_config(
    name: str, settings: CalibrationConfig | None, method: str, counted: Callable[[], None]
) -> None:
    counted()
    assert default_method(QuantConfig.preset(name), settings) == method


def made(pipe: Pipeline, config: QuantConfig, method: str | None = None) -> QuantizedPipeline:
    return varptq.quantize(pipe, config, method=method, calibration=FEW)


def loaded(folder: Path, **options: Any) -> tuple[QuantizedPipeline, list[str]]:
    """The artifact, and what loading it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = varptq.load(folder, **options)
    return pipe, [str(warning.message) for warning in caught]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "method"),
    [("w8a8", None), ("w6a6", "sas"), ("w8a8", "sas"), ("best", "sas"), ("w4a4+paper", None)],
)
def test_what_was_said_before_is_what_computes(
    one_block: Pipeline,
    preset: str,
    method: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: Callable[[], None],
) -> None:
    counted()
    monkeypatch.setattr(ModelChoice, "load_float", lambda _: one_block)
    words = ("--method", method) if method else ()
    folder = tmp_path / "artifact"
    ran = succeed(
        *("quantize", "demo", "--config", preset, *words, "--samples", 2, "--steps", 1),
        *("--out", folder, "--json"),
    )
    said = ran.document["runs_on"]
    first = ran.err.splitlines()[0]
    assert first == f"method {ran.document['method']}, runs on: {said}"
    pipe, warned = loaded(folder)
    if preset == "w4a4+paper":
        assert pipe.runtime == "simulated" and len(warned) == 1
        assert said in warned[0] and str(folder) in warned[0] and "\n" not in warned[0]
    else:
        assert (said, pipe.runtime, warned) == ("cpu", "cpu", [])
    assert succeed("info", folder, "--json").document["runs_on"] == said
    auto = succeed("info", folder, "--runtime", "--json").document["auto"]
    assert auto == pipe.runtime == said.partition(",")[0]
    assert varptq.generate(pipe, [0, 1], seed=0, decode=False).tokens.shape == (2, 14)
    # Asked for by name there is nothing to warn of.
    assert loaded(folder, runtime="simulated")[1] == []
    monkeypatch.setenv(ENVIRONMENT, "simulated")
    assert loaded(folder)[1] == []


def test_an_order_that_does_not_fit_is_said_before(
    one_block: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """A config of one's own, or an artifact from before orders followed the width."""
    counted()
    config = QuantConfig.preset("w8a8")
    assert config.attention is not None
    config = config.replace(attention=config.attention.replace(max_order=3))
    config = QuantConfig.from_dict(config.to_dict())
    expected = "shift-and-sum of order 3 with 8-bit values: integers up to 2040, at most 127"
    assert expected in foreseen(one_block.var, config, shift=True).runs_on
    assert foreseen(one_block.var, config).name == "cpu"
    pipe, warned = loaded(varptq.save(made(one_block, config, "rtn+shift"), tmp_path / "a"))
    assert pipe.runtime == "simulated" and len(warned) == 1 and expected in warned[0]


def test_a_block_whose_values_have_no_finer_step(
    make_tiny: Callable[..., Pipeline], tmp_path: Path, counted: Callable[[], None]
) -> None:
    """8-bit values in one block of a 4-bit config, as `varptq analyze` may choose: that block has
    no copies, and they cost nothing in the account."""
    counted()
    config = QuantConfig.preset("w4a4+groups")
    raised = QuantConfig.preset("w4a4+groups+v8").attention
    mixed = config.with_rules(LayerRule(targets="blocks.0.attn", attention=raised))
    quantized = made(make_tiny(), QuantConfig.from_dict(mixed.to_dict()), "rtn+shift")
    first, second = quant_mixes(quantized.var)
    assert first.theta is None and second.theta == quantized.theta is not None
    assert {stat["block"] for stat in quantized.report["theta"]["copies"]} == {1}
    assert fastest(quantized.var).name == "cpu"
    pipe, warned = loaded(varptq.save(quantized, tmp_path / "mixed"))
    assert (pipe.runtime, warned) == ("cpu", [])
    assert torch.isfinite(varptq.generate(pipe, [0], seed=0).images).all()  # pyright: ignore


MISPLACED = [
    ("demo --method sas+litevar", "litevar is a modifier of the config, as in w4a4+paper+litevar"),
    ("demo --method w8a8", "method 'w8a8': unknown"),
    ("demo --method w8a8", "w8a8 is a config"),
    ("demo --method released", "released is a modifier of the config"),
    ("demo --method released", "released is a calibration"),
    ("demo --config sas", "config 'sas': sas belongs to the method: give --method sas"),
    ("demo --config w4a4+gptq", "gptq belongs to the method: give --method gptq"),
    ("demo --config w4a4+shift", "shift belongs to the method: give --method rtn+shift"),
    ("var.pth", "give transformer and VQVAE as --var var.pth --vae vae.pth"),
    ("var_d16.safetensors", "--var var.pth --vae vae.pth"),
]


@pytest.mark.parametrize(("words", "answer"), MISPLACED)
def test_a_word_in_the_wrong_place(
    words: str, answer: str, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    ran = run("quantize", *words.split(), "--out", tmp_path / "out")
    assert ran.code == 2 and answer in ran.err and len(ran.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_hint_comes_with_a_mistake_only() -> None:
    with pytest.raises(ConfigError) as caught:
        Method.parse("magic")
    assert str(caught.value).endswith("any of +reconstruct, +shift, +resample")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "method", "total"),
    [
        (CalibrationConfig(num_samples=2), None, 6),
        (FEW.replace(steps=4), "brecq", 24),
        (FEW.replace(steps=0), "brecq", 6),
        (CalibrationConfig.preset("fast").replace(num_samples=2), "brecq", 6),
    ],
)
def test_progress_counts_what_is_done(
    one_block: Pipeline,
    settings: CalibrationConfig,
    method: str | None,
    total: int,
    counted: Callable[[], None],
) -> None:
    """Closed forms count units; steps are counted where steps are made."""
    counted()
    calls: list[tuple[int, int]] = []

    def listen(stage: str, done: int, total: int, info: str = "") -> None:
        if stage == "reconstruct":
            calls.append((done, total))

    config = QuantConfig.preset("w4a4")
    varptq.quantize(one_block, config, method=method, calibration=settings, progress=listen)
    assert {of for _, of in calls} == {total}
    done = [steps for steps, _ in calls]
    assert done == sorted(done) and set(done) == set(range(total + 1))
