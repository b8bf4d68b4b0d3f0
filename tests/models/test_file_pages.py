"""Pages of mapped files are given back, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from varptq.models.file_pages import SMAPS, FilePages

COUNT = 2**20


def resident(name: str) -> int:
    """KiB of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def mapped(path: Path) -> Tensor:
    torch.arange(COUNT, dtype=torch.float32).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=COUNT, dtype=torch.float32)


@pytest.mark.skipif(not SMAPS.exists(), reason="no smaps to read mappings from")
def test_what_was_read_of_a_file_is_given_back_and_read_again(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "numbers")
    total = float(tensor.sum())
    before = resident("RssFile")
    FilePages().release(tensor)
    assert resident("RssFile") < before - 3000
    assert float(tensor.sum()) == total


def test_what_was_written_stays(tmp_path: Path) -> None:
    tensor, own = mapped(tmp_path / "numbers"), torch.ones(COUNT)
    tensor[COUNT // 2] = -1
    for kept in (tensor, own, own[::2], torch.empty(0)):
        expected = kept.clone()
        FilePages().release(kept)
        assert torch.equal(kept, expected)
