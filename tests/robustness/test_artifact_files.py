"""Artifacts and work folders as others leave them: written over, half-filled, oddly named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import varptq
from varptq.errors import ArtifactError
from varptq.files import UNFINISHED
from varptq.models.pipeline import Pipeline
from varptq.progress import silent
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline
from varptq.web.catalogue import Catalogue, Kind
from varptq.work import Piece, Work


@pytest.fixture(scope="module")
def quantized(tiny: Pipeline) -> QuantizedPipeline:
    return varptq.quantize(tiny, QuantConfig.preset("w8a8"), method="rtn")


def test_an_artifact_written_to_while_in_use(
    quantized: QuantizedPipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """Its image encoder stays on the file: it is not computed with when that has changed."""
    path = varptq.save(quantized, tmp_path / "a") / "model.safetensors"
    side = quantized.vae.image_size[0]
    images = torch.zeros(1, 3, side, side)
    loaded = varptq.load(tmp_path / "a", runtime="reference")
    expected = loaded.vae.encoder(images)
    counted()
    varptq.save(quantized, tmp_path / "a", force=True)
    torch.testing.assert_close(loaded.vae.encoder(images), expected, rtol=0, atol=0)
    loaded = varptq.load(tmp_path / "a", runtime="reference")
    counted()
    os.truncate(path, 100)
    with pytest.raises(ArtifactError, match="changed while"):
        loaded.vae.encoder(images)
    assert varptq.generate(loaded, [0]).images is not None


def test_the_studio_passes_over_what_is_not_whole(
    quantized: QuantizedPipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    varptq.save(quantized, tmp_path / "a")
    assert len(Catalogue([tmp_path]).entries(Kind.artifact)) == 1
    (tmp_path / "a" / UNFINISHED).touch()
    assert not Catalogue([tmp_path]).entries(Kind.artifact)


def test_names_that_are_not_utf8(
    quantized: QuantizedPipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """Old disks and archives in GBK or Latin-1: artifacts and work folders, saved and read."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    counted()
    varptq.save(quantized, odd)
    # The second load is of a folder whose path has the odd name in its middle.
    (odd / "deep").mkdir()
    varptq.save(quantized, odd / "deep" / "a")
    for folder in (odd, odd / "deep" / "a"):
        assert varptq.generate(varptq.load(folder), [0]).tokens.shape == (1, 14)
    counted()
    with Work(odd / "w") as work:
        work.begin({"of": "a test"}, silent)
        assert work.once("piece", lambda: Piece({"x": torch.arange(3)})).tensors
