"""Random weights written shard by shard: those of the model that is built in memory."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import varptq
from helpers.infinity_states import PRESET
from varptq.errors import OutputError
from varptq.models import presets
from varptq.models.random_files import write_random


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_they_are_those_of_the_model_in_memory(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    with patch.dict(presets.PRESETS, {"tiny": PRESET}):
        built = varptq.build_model(name, seed=3, dtype=dtype)
        var, vae = write_random(name, tmp_path / "files", seed=3, dtype=dtype, shard_bytes=9999)
    assert len(list(var.parent.glob("*.safetensors"))) > 2
    loaded = varptq.load_model(var=var, vae=vae, dtype=dtype)
    for ours, theirs in ((loaded.var, built.var), (loaded.vae, built.vae)):
        expected = theirs.state_dict()
        assert list(ours.state_dict()) == list(expected)
        assert all(torch.equal(t, expected[key]) for key, t in ours.state_dict().items())


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        write_random("demo", tmp_path)
