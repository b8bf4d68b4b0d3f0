"""Models for a running API: one on integers, as most will be served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.runtime_variants import simulated
from helpers import text_program
from varptq.models.pipeline import Pipeline
from varptq.runtime import load
from varptq.runtime.convert import on_integers as to_integers
from varptq.runtime.cpu import cpu_kernels


@pytest.fixture(scope="session")
def on_integers(models: Path) -> Pipeline:
    return load(models / "w4a4")


@pytest.fixture(scope="session")
def text_on_integers() -> Pipeline:
    pipe = text_program.model()
    quantized = to_integers(simulated(pipe, "w8a8"), cpu_kernels())
    return replace(quantized, encoder=pipe.encoder)


@pytest.fixture(scope="session")
def server(on_integers: Pipeline) -> Iterator[Any]:
    """With room for a crowd, and a second model that reads texts."""
    pytest.importorskip("openai", reason="the API's client is openai: varptq[dev]")
    from helpers.api_server import running

    texts = text_program.model().sized(text_program.SIZE)
    with running({"tiny": on_integers, "texts": texts}) as started:
        yield started
