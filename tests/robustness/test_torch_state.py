"""What a program has set in torch reaches no number of ours: every verb gives the bytes it gives in
a fresh program."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

import varptq
from helpers.few_images import analyze_few
from varptq import CalibrationConfig, Pipeline, QuantConfig
from varptq.analyze.analyze import AnalysisConfig, analyze
from varptq.errors import InputError
from varptq.evaluate.evaluate import Subject, evaluate
from varptq.evaluate.sampling import sample_set
from varptq.models.state_file import networks_sha256
from varptq.torch_state import plain_torch

CALIBRATION = CalibrationConfig(
    num_samples=2, steps=2, tune_steps=2, theta_samples=1, theta_grid=10, rounding="gptq+adaround"
)
ANALYSIS = AnalysisConfig(images=1, widths=(4,))
CONFIG = QuantConfig.preset("w4a4")
RUNTIMES = ("simulated", "reference", "cpu")
PICTURE = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))


@contextmanager
def setting(change: Callable[[], object], restore: Callable[[], object]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        restore()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(
        lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(torch.float32)
    )


def grad_off() -> AbstractContextManager[None]:
    return setting(lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True))


def precision(name: str) -> AbstractContextManager[None]:
    return setting(
        lambda: torch.set_float32_matmul_precision(name),
        lambda: torch.set_float32_matmul_precision("highest"),
    )


def deterministic() -> AbstractContextManager[None]:
    return setting(
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    )


@contextmanager
def advanced_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        torch.rand(7)
        yield


@contextmanager
def numpy_raises() -> Iterator[None]:
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Watching(TorchFunctionMode):
    """What profilers and loggers push."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


# Several at a time: each run is a second, and one that leaks shows in any company.
STATES: dict[str, tuple[Callable[[], AbstractContextManager[object]], ...]] = {
    "default dtype float16, no_grad": (lambda: default_dtype(torch.float16), torch.no_grad),
    "default dtype float64, default device": (
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
    ),
    "default dtype bfloat16, autocast, inference_mode": (
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
    ),
    "matmul precision, deterministic, set_grad_enabled(False)": (
        lambda: precision("medium"),
        deterministic,
        grad_off,
    ),
    "seeded generator, raising numpy and warnings, modes and hooks": (
        advanced_generator,
        numpy_raises,
        Watching,
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    ),
}


@contextmanager
def state(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for enter in STATES[name]:
            stack.enter_context(enter())
        yield


@pytest.fixture(scope="module")
def model(make_tiny: Callable[..., Pipeline]) -> Pipeline:
    return make_tiny(depth=1)


def tensors(pipe: Pipeline) -> str:
    return networks_sha256(pipe.var, pipe.vae)


def results(model: Pipeline, artifact: Path, folder: Path) -> dict[str, object]:
    """Of every verb something that shows each of its bits."""
    found: dict[str, object] = {"float": drawn(model), "smooth": drawn(model, more_smooth=True)}
    made = varptq.quantize(model, CONFIG, method="sas", calibration=CALIBRATION)
    found["quantize"] = made.report
    for path in varptq.save(made, folder / "artifact").iterdir():
        found[path.name] = path.read_bytes()
    for runtime in RUNTIMES:
        loaded = varptq.load(artifact, runtime=runtime)
        found[f"load {runtime}"], found[runtime] = tensors(loaded), drawn(loaded)
    edited = varptq.edit(model, PICTURE, box=(0.2, 0.2, 0.7, 0.7), seed=1)
    found["edit"] = [edited.tokens.tolist(), edited.images[0].tobytes()]
    sets = [
        Subject(p, sample_set(p, folder / f"{i}", count=2)) for i, p in enumerate((made, model))
    ]
    document = evaluate(*sets)
    found["evaluate"] = {k: v for k, v in document.items() if k not in ("versions", "machine")}
    return found


def drawn(pipe: Pipeline, **settings: bool) -> bytes:
    out = varptq.generate(pipe, [0, 3], seed=5, cfg=3, **settings)
    assert out.images is not None
    assert not out.images.is_inference()  # the caller may want gradients of what it makes of them
    return out.tokens.numpy().tobytes() + out.images.numpy().tobytes()


@pytest.fixture(scope="module")
def artifact(model: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = varptq.quantize(model, CONFIG, method="rtn", calibration=CALIBRATION)
    return varptq.save(made, tmp_path_factory.mktemp("state") / "artifact")


@pytest.fixture(scope="module")
def plain(
    model: Pipeline, artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    return results(model, artifact, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_every_verb_gives_the_same_bytes(
    name: str,
    model: Pipeline,
    artifact: Path,
    plain: dict[str, object],
    tmp_path: Path,
    counted: Callable[[], None],
) -> None:
    with state(name):
        found = results(model, artifact, tmp_path)
    for verb, value in plain.items():
        counted()
        assert found[verb] == value, verb


@pytest.mark.slow
def test_an_analysis_gives_the_same_numbers(
    model: Pipeline, counted: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    analyze_few(monkeypatch.setattr)

    def numbers() -> dict[str, object]:
        document = analyze(model, CONFIG, settings=ANALYSIS).document
        return {name: value for name, value in document.items() if name != "seconds"}

    plain = numbers()
    for name in ("default dtype float64, default device", *list(STATES)[2:4]):
        counted()
        with state(name):
            assert numbers() == plain, name


def test_a_call_leaves_the_state_of_the_program(
    model: Pipeline, counted: Callable[[], None]
) -> None:
    def seen() -> list[object]:
        return [
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.random.get_rng_state().tolist(),
            torch.get_num_threads(),
        ]

    for name in STATES:
        counted()
        with state(name):
            before = seen()
            varptq.generate(model, [1], decode=False)
            with pytest.raises(InputError):
                varptq.generate(model, [99])
            assert seen() == before, name


def test_precision_is_the_callers_again_when_the_last_call_ends(
    counted: Callable[[], None],
) -> None:
    """Two calls in two threads, the first ending first."""
    counted()
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    full = x @ x
    first, second = plain_torch(), plain_torch()
    with precision("medium"):
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(x @ x, full)
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.slow
def test_weights_made_in_inference_mode_can_be_calibrated(
    model: Pipeline, plain: dict[str, object], tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    with torch.inference_mode():
        made_there = copy.deepcopy(model)
    assert all(parameter.is_inference() for parameter in made_there.var.parameters())
    result = varptq.quantize(made_there, CONFIG, method="sas", calibration=CALIBRATION)
    assert result.report == plain["quantize"]
    with torch.inference_mode():
        loaded = varptq.load_model("demo").to(dtype=torch.bfloat16)
    assert not any(parameter.is_inference() for parameter in loaded.var.parameters())
