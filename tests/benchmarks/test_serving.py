"""What benchmarks/speed/serving.py counts is what it asked for; its table says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("openai", reason="the load is made by openai: varptq[dev]")

from benchmarks.common.results import read_document
from benchmarks.speed import serving as script
from helpers.api_server import API, running
from varptq.models.pipeline import Pipeline

pytestmark = API


def test_every_client_gets_its_images(tiny: Pipeline) -> None:
    with running({"tiny": tiny}, batch_size=4) as server:
        assert len(script.asyncio.run(script.load(server.address, 1, 1))) == 1
        found = script.level(server.address, 3, 7)
        assert (found["clients"], found["images"]) == (3, 6)
        assert 0 < found["median"] <= found["95%"] <= found["longest"]
        assert 1 <= found["images a batch"] <= 3
        assert found["CPU an image"] > 0


def test_the_page_is_what_the_script_makes_of_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.read_text().replace("| clients |", "| people |"))
    expected = script.PAGE.read_text()
    monkeypatch.setattr(script, "PAGE", page)
    script.write_page()
    assert page.read_text() == expected
    assert "demo" in {found["model"] for found in read_document(script.NAME)["models"]}
