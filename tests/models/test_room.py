"""Keys and values of a pass on files: the same numbers, one block's in memory, nothing left."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import varptq
from helpers.infinity_states import pipeline
from varptq.errors import OutputError
from varptq.models.file_pages import SMAPS
from varptq.models.on_demand import OnDemand
from varptq.models.pipeline import Pipeline
from varptq.models.room import FileRoom
from varptq.models.seams import LayerCache

PAGES = 2**18
OF_ROOM = re.compile(r"kept\.bin \(deleted\)$")
# So many that each file has whole pages.
COPIES = 16
ASKED = ["a red kettle on a stove", "two foxes", "a boat"]

needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="no smaps to read mappings from")


def resident() -> list[int]:
    """KiB in memory of each file of a room that is mapped."""
    found: list[int] = []
    own = False
    for line in SMAPS.read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            own = bool(OF_ROOM.search(line))
        elif own and line.startswith("Rss:"):
            found.append(int(line.split()[1]))
    return found


@needs_smaps
def test_what_is_not_entered_is_given_back_and_read_again(tmp_path: Path) -> None:
    room, like = FileRoom(str(tmp_path)), torch.empty(0)
    shape = (1, 1, PAGES, 1)
    first, second = (
        LayerCache(room.empty(shape, like), room.empty(shape, like), room) for _ in range(2)
    )
    ones = torch.ones(1, 1, PAGES // 2, 1)
    first.append(ones, 2 * ones)
    assert sum(resident()) >= 2 * 2 * PAGES // 1024
    second.append(3 * ones, 3 * ones)
    keys, values = first.append(4 * ones, 5 * ones)
    # `second` was entered in between, and is given back again.
    assert sorted(count > 0 for count in resident()) == [False, False, True, True]
    assert keys.flatten()[:: PAGES // 2].tolist() == [1, 4]
    assert values.flatten()[:: PAGES // 2].tolist() == [2, 5]
    kept = room.keep(ones)
    assert torch.equal(kept, ones) and kept.data_ptr() != ones.data_ptr()
    assert not list(tmp_path.iterdir())
    del first, second, keys, values, kept
    assert not resident()


@pytest.mark.slow
@needs_smaps
@pytest.mark.parametrize("reads", ["classes", "texts"])
def test_a_model_by_blocks_remembers_on_files(
    reads: str, make_tiny: Callable[..., Pipeline], tmp_path: Path
) -> None:
    pipe = make_tiny() if reads == "classes" else pipeline()
    asked: Any = COPIES * ([1, 2, 3] if reads == "classes" else ASKED)
    expected = varptq.generate(pipe, asked, seed=3, decode=False, batch_size=len(asked)).tokens
    blocks = OnDemand(pipe.var, torch.float32, torch.device("cpu"), str(tmp_path))
    streamed = Pipeline(blocks.var, pipe.vae, "by blocks", family=pipe.family, encoder=pipe.encoder)
    seen: list[tuple[int, int]] = []

    def look(_: Any) -> None:
        # The last page of a file may stay.
        pages = resident()
        seen.append((len(pages), sum(count > mmap.PAGESIZE // 1024 for count in pages)))

    found = varptq.generate(
        streamed, asked, seed=3, decode=False, on_scale=look, batch_size=len(asked)
    ).tokens
    assert torch.equal(found, expected)
    depth = len({name.split(".")[1] for name, _ in pipe.var.named_modules() if ".attn" in name})
    mapped, most = (max(column) for column in zip(*seen, strict=True))
    assert mapped >= 2 * depth and 1 <= most <= mapped / depth
    assert not resident()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"spool_dir .*nowhere: cannot be used"):
        FileRoom(str(tmp_path / "nowhere")).empty((3,), torch.empty(0))
