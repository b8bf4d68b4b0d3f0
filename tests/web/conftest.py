"""A studio in a process of its own, over a folder with a small model as files and an artifact."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from helpers import text_program
from helpers.studio_pages import DEMO_ARTIFACT, DESK, PATIENCE, turn
from varptq.artifact import save
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig

OTHER_WEIGHTS = 5
ADDRESS = re.compile(r"varptq studio: (http://\S+?)/$", re.MULTILINE)
START_SECONDS = 300


def fill(models: Path, make_tiny: Callable[..., Pipeline]) -> None:
    """`models`/small: a float model as two files; `models`/w4a4: an artifact of another one."""
    small = make_tiny(OTHER_WEIGHTS)
    (models / "small").mkdir(parents=True)
    write(small, models / "small")
    calibration = CalibrationConfig(num_samples=2, steps=1, theta_samples=1, theta_grid=50)
    made = quantize(make_tiny(), QuantConfig.preset("w4a4"), method="rtn", calibration=calibration)
    save(made, models / "w4a4")


def write(pipe: Pipeline, folder: Path) -> None:
    """The two files of a float model."""
    for part, network in (("var", pipe.var), ("vae", pipe.vae)):
        state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, folder / f"{part}.safetensors")


@dataclass(frozen=True)
class Served:
    """A running studio."""

    address: str
    models: Path
    out: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Pipeline]) -> Path:
    folder = tmp_path_factory.mktemp("studio") / "models"
    fill(folder, make_tiny)
    return folder


@contextmanager
def serving(
    command: list[str], models: Path, place: Path, *options: str, **env: str
) -> Iterator[Served]:
    """A studio over `models` that keeps what it makes under `place`."""
    out, log = place / "made", place / "log"
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    settings = {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(place / "cache")}
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [*command, "serve", str(models), "--out", str(out), "--port", "0", *options],
            stderr=errors,
            env={**inherited, **settings, **env},
        )
    try:
        yield Served(address_in(log, process), models, out)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def served(models: Path, tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Iterator[Served]:
    """On the runtime that `auto` means here, as a user gets it, with one more published model,
    which reads texts."""
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    place, files = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("tiny-text")
    write(text_program.model(), files)
    command = [str(warm / "python"), str(text_program.__file__)]
    with serving(command, models, place, **{text_program.FOLDER: str(files)}) as running:
        yield running


@pytest.fixture(scope="session")
def without_cuda(
    models: Path, tmp_path_factory: pytest.TempPathFactory, warm: Path
) -> Iterator[Served]:
    """One that is told to compute on a runtime which its device cannot have."""
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    place = tmp_path_factory.mktemp("cuda")
    with serving([str(warm / "varptq")], models, place, "--runtime", "cuda") as running:
        yield running


def address_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    """What the studio says once it is open."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := ADDRESS.search(log.read_text()):
            return found[1]
        time.sleep(0.05)
    pytest.fail(f"the studio did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def artifact(served: Any) -> None:
    """`DEMO_ARTIFACT`, made by the studio itself."""
    from helpers.studio_calls import Caller  # wants what the studio wants

    settings = ("w4a4", "rtn", "fast", 2, 1, 0, DEMO_ARTIFACT.partition("/")[2], True)
    answer = Caller(served.address).call("quantize", "demo", *settings)
    assert answer.ok, answer.error


@pytest.fixture(scope="session")
def window(browser: Any) -> Iterator[Any]:
    """One for all pages, so that a browser fetches and compiles their programs once."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def open_page(served: Any, window: Any) -> Iterator[Callable[..., Any]]:
    """Opens the studio on a tab; watches what the page asks for and complains of."""
    asked, complaints, pages = [], [], []

    def opened(tab: str, size: tuple[int, int] = DESK, scheme: str = "light") -> Any:
        page = window.new_page()
        pages.append(page)
        turn(page, size, scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.goto(served.address)
        page.locator("#generate-model input").wait_for()
        page.get_by_role("tab", name=tab).click()
        return page

    yield opened
    for page in pages:
        page.close()
    own = (served.address, "data:", "blob:")
    assert asked and not [url for url in asked if not url.startswith(own)]
    assert not complaints
