"""The runtime is the one asked for, or an error that names what works; never another in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import varptq
from helpers.cli_calls import run
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.models.var.transformer import VAR
from varptq.native import binding
from varptq.quant.config import LayerRule, QuantConfig, TensorSpec
from varptq.quant.convert import convert
from varptq.quant.quantizers import QUANTIZERS
from varptq.runtime import RUNTIMES, resolve
from varptq.runtime.convert import on_integers, without_kernel
from varptq.runtime.resolve import ENVIRONMENT, INTEGER, asked_for, survey

Make = Callable[..., Pipeline]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(scope="module")
def w4a4(tiny: Pipeline) -> VAR:
    return convert(tiny.var, QuantConfig.preset("w4a4"))


@pytest.fixture(scope="module")
def paper(tiny: Pipeline) -> VAR:
    return convert(tiny.var, QuantConfig.preset("w4a4+paper"))


def test_auto_is_the_fastest_that_can(w4a4: VAR, paper: VAR) -> None:
    choice = resolve(w4a4)
    assert (choice.name, choice.kernels is not None) == ("cpu", True)
    fallback = resolve(paper)
    assert (fallback.name, fallback.kernels) == ("simulated", None)
    assert "runtime 'cpu' cannot: layer blocks.0.attn" in fallback.reason


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "simulated "])
def test_an_unknown_runtime_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown; use one of auto, simulated, reference, cpu"):
        asked_for(name)


def test_the_environment_decides_for_auto_only(monkeypatch: pytest.MonkeyPatch, w4a4: VAR) -> None:
    for value in (*RUNTIMES, "auto", "", " simulated\n"):
        monkeypatch.setenv(ENVIRONMENT, value)
        assert asked_for("auto") == (value.strip() or "auto")
        assert asked_for("reference") == "reference"
    monkeypatch.setenv(ENVIRONMENT, "simulated")
    assert resolve(w4a4).name == "simulated"
    monkeypatch.setenv(ENVIRONMENT, "warp")
    with pytest.raises(InputError, match="VARPTQ_RUNTIME: runtime 'warp': unknown"):
        resolve(w4a4)


def test_a_runtime_of_another_device_is_refused(w4a4: VAR) -> None:
    for runtime, device in (("cuda", "cpu"), ("cpu", "cuda"), ("reference", "cuda")):
        with pytest.raises(InputError, match=rf"runtime '{runtime}': computes on \w+, the device"):
            resolve(w4a4, runtime, device)
    assert resolve(w4a4, device="meta").name == "simulated"


HALVES = {
    "weight": ({"weight": None}, "weight in float, the other side in integers"),
    "input": ({"input": None}, "input in float, the other side in integers"),
}


@pytest.mark.parametrize("side", HALVES)
@pytest.mark.parametrize("runtime", ["reference", "cpu"])
def test_a_layer_with_one_side_in_float_is_refused(runtime: str, side: str, tiny: Pipeline) -> None:
    changes, words = HALVES[side]
    rule = LayerRule(targets="blocks.1.ffn.fc1", **changes)
    var = convert(tiny.var, QuantConfig.preset("w8a8").with_rules(rule))
    with pytest.raises(
        InputError, match=rf"runtime '{runtime}': layer blocks\.1\.ffn\.fc1: {words}"
    ):
        resolve(var, runtime)


def test_groups_that_do_not_nest_are_refused_by_the_cpu(make_tiny: Make) -> None:
    rule = LayerRule(
        targets="blocks.0.ffn.fc1",
        weight=TensorSpec(num_bits=4, strategy="group", group_size=96),
        input=TensorSpec(num_bits=4, strategy="group", group_size=64),
    )
    var = convert(make_tiny(width=192).var, QuantConfig.preset("w4a4").with_rules(rule))
    assert resolve(var, "reference").name == "reference"
    with pytest.raises(InputError, match=r"fc1: input groups of 64 and weight groups of 96"):
        resolve(var, "cpu")


@pytest.mark.parametrize("runtime", INTEGER)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_type_without_a_kernel_is_refused_by_name(name: str, runtime: str) -> None:
    spec, row = TensorSpec(num_bits=4, type=name), QUANTIZERS[name]
    for operand in row.operands:
        reason = without_kernel({"weight": None, operand: spec}, runtime)
        if runtime in row.kernels:
            assert reason is None
        else:
            assert reason is not None and f"{operand} type {name!r}, expected '" in reason


@pytest.mark.parametrize("runtime", ["reference", "cpu"])
def test_layers_left_in_float_are_no_reason_to_refuse(runtime: str, tiny: Pipeline) -> None:
    rules = [
        LayerRule(targets=target, weight=None, input=None) for target in ("head", "blocks.*.fc2")
    ]
    attention = LayerRule(targets="blocks.0.attn", attention=None)
    pipe = varptq.quantize(
        tiny, QuantConfig.preset("w8a8").with_rules(*rules, attention), method="rtn"
    )
    choice = resolve(pipe.var, runtime)
    assert choice.kernels is not None
    integers = on_integers(pipe, choice.kernels)
    tokens = varptq.generate(integers, [0, 1, 2], seed=1, decode=False).tokens
    alone = varptq.generate(integers, [2], seed=1, first_index=2, decode=False).tokens
    assert torch.equal(tokens[2:], alone)


@pytest.mark.slow
def test_info_says_which_and_why(tiny: Pipeline, tmp_path: Path) -> None:
    for preset, auto in (("w8a8", "cpu"), ("w8a8+paper", "simulated")):
        quantized = varptq.quantize(tiny, QuantConfig.preset(preset), method="rtn")
        folder = varptq.save(quantized, tmp_path / preset)
        document = json.loads(run("info", folder, "--runtime", "--json").out)
        assert document["auto"] == auto
        assert document["cannot"]["simulated"] == document["cannot"]["reference"] == ""
        assert bool(document["cannot"]["cpu"]) == (auto == "simulated")
        assert document["threads"] == torch.get_num_threads()
        text = run("info", folder, "--runtime").out
        assert all(name in text for name in RUNTIMES)
    assert document["native"]["reason"] == binding.reason()
    machine = json.loads(run("info", "--runtime", "--json").out)
    assert machine["auto"] is None
    assert machine["cannot"]["cpu"] == ""


def test_no_gpu_is_a_reason() -> None:
    expected = "" if torch.cuda.is_available() else "this machine has no CUDA device"
    assert survey()["cuda"] == expected
