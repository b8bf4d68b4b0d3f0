"""What all tests share: one thread, no deadlines on property tests, and tiny random models.

The models have odd sizes where they can (5 classes) and width 128, the smallest on which groups of
128 input channels apply. Tests only read the session's models; one that changes a model builds its
own with `make_tiny`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from helpers.hub_server import Client, running
from helpers.studio_pages import CHROMIUM, FLAGS
from helpers.warm import commands
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.var.transformer import VAR, VARArch, randomize
from varptq.models.var.vqvae import VQVAE, VQVAEArch

# Triton reads this when a kernel is defined, and any test may be the first to import the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Times vary tenfold between machines, and a first example also pays for what torch sets up.
settings.register_profile("varptq", deadline=None)
settings.load_profile("varptq")

SCALES = Scales((1, 2, 3))
VAR_ARCH = VARArch(
    num_classes=5,
    depth=2,
    width=128,
    num_heads=2,
    scales=SCALES,
    codebook_size=32,
    code_dim=8,
    l2_norm=True,
    shared_adaln=False,
)
VAE_ARCH = VQVAEArch(
    ch=32,
    ch_mult=(1, 1),
    num_res_blocks=1,
    code_dim=8,
    codebook_size=32,
    num_phi=2,
    attn_levels=(1,),
    mid_attn=True,
)
CLASS_NAMES = ("ant", "bee", "cat", "dog", "eel")
# A fresh model's logits hardly depend on class and context; these factors make them.
LIVELY = {"class_emb.weight": 50.0, "word_embed.weight": 10.0, "head.weight": 10.0}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, one a process: a second driver in the same process would not start."""
    playwright = pytest.importorskip("playwright", reason="no playwright to drive a browser with")
    if CHROMIUM is None:
        pytest.skip("no chromium to open pages with")
    with importlib.import_module(f"{playwright.__name__}.sync_api").sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """A folder with the commands `python` and `varptq`, which begin with everything imported."""
    # Not below tmp_path, whose length sockets may not take.
    with tempfile.TemporaryDirectory() as folder, commands(Path(folder)) as filled:
        yield filled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs another process is slow, so that `make check` starts none."""
    for item in items:
        if "warm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def hub(warm: Path, tmp_path: Path) -> Iterator[Client]:
    """Processes that take a server of this test for the Hugging Face hub."""
    with running() as server:
        yield Client(warm, server, tmp_path / "hub home")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def build_tiny(seed: int = 0, **changes: object) -> Pipeline:
    """A frozen random pipeline; `changes` replace fields of the transformer's architecture."""
    arch = dataclasses.replace(VAR_ARCH, **changes)
    var, vae = VAR(arch), VQVAE(VAE_ARCH, arch.scales)
    randomize(var, torch.Generator().manual_seed(seed))
    vae.randomize(torch.Generator().manual_seed(seed + 1))
    for name, factor in LIVELY.items():
        var.get_parameter(name).data.mul_(factor)
    var.eval().requires_grad_(False)
    vae.eval().requires_grad_(False)
    return Pipeline(var, vae, "tiny", CLASS_NAMES, {"var": "random", "vae": "random"})


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Pipeline]:
    return build_tiny


@pytest.fixture(scope="session")
def tiny() -> Pipeline:
    return build_tiny()


@pytest.fixture(scope="session")
def tiny_shared() -> Pipeline:
    """One AdaLN layer for all blocks, as in the largest published model."""
    return build_tiny(shared_adaln=True)


@pytest.fixture(scope="session")
def tiny_no_l2() -> Pipeline:
    """Attention on q and k as they are, scaled by 0.25 / sqrt(c)."""
    return build_tiny(l2_norm=False)


@pytest.fixture(params=["tiny", "tiny_shared", "tiny_no_l2"])
def any_tiny(request: pytest.FixtureRequest) -> Pipeline:
    """A test with this argument runs on each kind of model."""
    return request.getfixturevalue(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A browser keeps an event loop running on this thread to the end of the session. Tests
    without one may run loops of their own."""
    loop = asyncio._get_running_loop()
    if loop is None or "browser" in getattr(item, "fixturenames", ()):
        return (yield)
    asyncio._set_running_loop(None)
    try:
        return (yield)
    finally:
        asyncio._set_running_loop(loop)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases the robustness suite tried, over all its tests and workers."""
    # The count is known when its fixture ends: in the report of the teardown, which has no name.
    reports = terminalreporter.getreports("")
    counts = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "robustness cases"
    ]
    if counts:
        terminalreporter.write_line(f"robustness: {sum(counts)} cases tried")
