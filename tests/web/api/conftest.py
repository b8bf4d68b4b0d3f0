"""Models for a running API: one on integers, as most will be served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from varptq.models.pipeline import Pipeline
from varptq.runtime import load


@pytest.fixture(scope="session")
def on_integers(models: Path) -> Pipeline:
    return load(models / "w4a4")


@pytest.fixture(scope="session")
def server(on_integers: Pipeline) -> Iterator[Any]:
    """With room for a crowd, and a second model that reads texts."""
    pytest.importorskip("openai", reason="the API's client is openai: varptq[dev]")
    from helpers import text_program
    from helpers.api_server import running
    from helpers.infinity_states import Words

    texts = text_program.model().sized(text_program.SIZE)
    texts.encoder = Words()
    with running({"tiny": on_integers, "texts": texts}) as started:
        yield started
