"""Devices and dtypes that a model cannot have: refused in one line, before a file is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import varptq
from helpers.checkpoint_states import one_line
from varptq import artifact
from varptq.errors import ConfigError, NonFiniteError
from varptq.evaluate.features import ModuleFeatures
from varptq.models.pipeline import Pipeline, build_model, load_model
from varptq.models.placement import checked_device, checked_dtype
from varptq.web.loaded import LoadedModels

NOWHERE = Path("nowhere.pth")
# What takes a device or a dtype. None of them gets as far as its files.
TAKERS: dict[str, Callable[..., Any]] = {
    "load_model": lambda **given: load_model(var=NOWHERE, vae=NOWHERE, **given),
    "build_model": lambda **given: build_model("demo", **given),
    "load": lambda **given: varptq.load(NOWHERE, **given),
    "artifact.load": lambda **given: artifact.load(NOWHERE, **given),
    "studio": lambda **given: LoadedModels(**given),
}
CUDA = "cuda" if not torch.cuda.is_available() else "cuda:99"
DEVICES = [
    CUDA,
    "cuda:77",
    "mps",
    "meta",
    "gpu",
    "",
    "cpu:3",
    "cuda:-1",
    "cuda:x",
    7,
    None,
    1.5,
    True,
]
DTYPES = [
    torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "", "int8", "fp16", None, 32,
]  # fmt: skip


@pytest.mark.parametrize("taker", TAKERS)
def test_devices_that_are_not_here(taker: str, counted: Callable[[], None]) -> None:
    for device in DEVICES:
        counted()
        with pytest.raises(ConfigError) as caught:
            TAKERS[taker](device=device)
        one_line(caught, f"{device}", "expected cpu, cuda or cuda:N")


@pytest.mark.parametrize("taker", TAKERS)
def test_dtypes_that_no_model_has(taker: str, counted: Callable[[], None]) -> None:
    for dtype in DTYPES:
        counted()
        with pytest.raises(ConfigError) as caught:
            TAKERS[taker](dtype=dtype)
        one_line(caught, f"{dtype}", "expected a floating dtype", "float32")


def test_names_and_objects_mean_the_same(counted: Callable[[], None]) -> None:
    for name in ("float32", "bfloat16", "float16", "float64"):
        counted()
        assert checked_dtype(name) == checked_dtype(f"torch.{name}") == getattr(torch, name)
    for device in ("cpu", torch.device("cpu"), "cpu:0"):
        counted()
        assert checked_device(device).type == "cpu"


def test_moving_a_pipeline(make_tiny: Callable[..., Pipeline], counted: Callable[[], None]) -> None:
    """Refused as a whole: nothing of it has moved or been cast."""
    pipe = make_tiny()
    for given in ({"device": CUDA}, {"dtype": torch.int8}, {"dtype": "bfloat16", "device": "mps"}):
        counted()
        with pytest.raises(ConfigError):
            pipe.to(**given)
        assert pipe.dtype == torch.float32 and pipe.device.type == "cpu"
    assert pipe.to(dtype="bfloat16").dtype == torch.bfloat16


def test_weights_beyond_a_half(
    make_tiny: Callable[..., Pipeline], counted: Callable[[], None]
) -> None:
    counted()
    pipe = make_tiny()
    with torch.no_grad():
        pipe.var.head.weight[0, 0] = 1e5
    with pytest.raises(NonFiniteError) as caught:
        pipe.to(dtype=torch.float16)
    one_line(caught, "'head.weight'", "65504", "bfloat16")
    assert pipe.dtype == torch.float32


def test_a_network_that_measures(counted: Callable[[], None]) -> None:
    counted()
    with pytest.raises(ConfigError) as caught:
        ModuleFeatures(torch.nn.Identity(), "x", CUDA)
    one_line(caught, CUDA, "use cpu" if CUDA == "cuda" else "cuda:0")
