"""A checkpoint in several files: an index of JSON says which tensor lies in which of them.

    model.safetensors.index.json   {"weight_map": {tensor: file beside the index, ...}}

A folder stands for the only checkpoint in it. Every shard must be there and hold exactly the
tensors that the index says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from varptq.errors import CheckpointError
from varptq.models.file_kinds import AGAIN, SAFETENSORS_SUFFIX, TORCH_SUFFIXES, read_content

INDEX_SUFFIX = ".index.json"
MAX_INDEX_BYTES = 2**26
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.\w+")


def located(path: str | Path) -> Path:
    """The file or index that `path` stands for; in a folder it is the only checkpoint there.

    Raises `CheckpointError` for a folder with none or several.
    """
    path = Path(path)
    try:
        names = sorted(e.name for e in path.iterdir()) if path.is_dir() else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if names is None:
        return path
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{path}: is a distributed checkpoint of torch, expected one file: merge it with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER model.pth"
        )
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    kinds = (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX)
    found = indices or [name for name in names if Path(name).suffix in kinds]
    if not found:
        raise CheckpointError(
            f"{path}: is not a file, expected a checkpoint file, or a folder with one in it"
        )
    if len(found) > 1:
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(f"{path}: holds {len(found)} checkpoints ({shown}): give one of them")
    return path / found[0]


def files_of(path: str | Path) -> list[Path]:
    """The files whose bytes make the checkpoint: itself, or its index and shards."""
    path = located(path)
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_weight_map(path).values())))]


def read_all(path: str | Path) -> Any:
    """What the checkpoint at `path` holds: one file as it is, shards as one dict of tensors.

    Raises `CheckpointError` as `read_content`, and for a shard without the others, a shard that is
    missing, and an index that its shards do not bear out.
    """
    path = located(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    shard = SHARD.fullmatch(path.name)
    if shard and int(shard[3]) > 1 and path.is_file():
        raise CheckpointError(
            f"{path}: is shard {int(shard[2])} of {int(shard[3])}, expected all of them: give "
            f"their index, {shard[1]}{path.suffix}{INDEX_SUFFIX}, or the folder"
        )
    return read_content(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _weight_map(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{index}: its shard {name} is missing, {AGAIN}")
        content = read_content(shard)
        promised = {tensor for tensor, file in weight_map.items() if file == name}
        if not isinstance(content, dict) or set(content) != promised:
            odd = promised.symmetric_difference(content if isinstance(content, dict) else ())
            raise CheckpointError(
                f"{shard}: does not hold the tensors that {index.name} says, "
                f"{min(map(str, odd))!r} being one: {AGAIN}, the index too"
            )
        state |= content
    return state


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names to names of files in the folder of the index."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if entries.setdefault(name, value) != value:
                raise CheckpointError(f"{index}: names {name!r} twice, {AGAIN}")
        return entries

    try:
        with index.open("rb") as file:
            text = file.read(MAX_INDEX_BYTES + 1)
        if len(text) > MAX_INDEX_BYTES:
            raise ValueError(f"over {MAX_INDEX_BYTES >> 20} MiB")
        content = json.loads(text, object_pairs_hook=once)
        weight_map = content["weight_map"]
        entries = {str(tensor): str(Path(file).name) for tensor, file in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{index}: is no index of shards, expected JSON with a weight_map ({reason}): {AGAIN}"
        ) from None
    if not entries or entries != weight_map:
        raise CheckpointError(
            f"{index}: its weight_map names no files, or files elsewhere: expected names of files "
            "beside it"
        )
    return entries
