"""Samples as the folders that the scripts of text-to-image benchmarks read.

    geneval       00000/metadata.jsonl, 00000/samples/0000.png: a folder per prompt, and what the
                  prompt file says of it (Ghosh et al., 2023)
    imagereward   ID/ID_0.png and metadata.jsonl, a JSON list whose records name their pictures
                  (Xu et al., 2023, as Infinity's scripts for it read them)
    mjhq          CATEGORY/ID.png, a picture per prompt (Li et al., 2024)

What a prompt is called comes from the records of its file: "id" and "category", else its number.
The networks that judge these folders are not here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varptq.errors import InputError
from varptq.evaluate.sampling import SampleSet
from varptq.files import StagedFolder

Record = dict[str, Any]
METADATA = "metadata.jsonl"
# What lies in every folder of ours, so that it may be replaced by another.
MARKER = "prompts.json"
NAME = re.compile(r"[\w-][\w.-]{0,99}")


@dataclass(frozen=True)
class Layout:
    """place: of picture `index` of a prompt. metadata: writes what stands beside the pictures."""

    place: Callable[[Record, int], Path]
    metadata: Callable[[Path, Sequence[Record], Sequence[Sequence[Path]]], None]
    single: bool = False


def _geneval(record: Record, index: int) -> Path:
    return Path(f"{record['number']:05}", "samples", f"{index:04}.png")


def _geneval_metadata(
    folder: Path, records: Sequence[Record], pictures: Sequence[Sequence[Path]]
) -> None:
    for record in records:
        place = folder / f"{record['number']:05}" / METADATA
        place.parent.mkdir(exist_ok=True)
        place.write_text(_json(record["said"]) + "\n", encoding="utf-8")


def _imagereward(record: Record, index: int) -> Path:
    return Path(record["id"], f"{record['id']}_{index}.png")


def _imagereward_metadata(
    folder: Path, records: Sequence[Record], pictures: Sequence[Sequence[Path]]
) -> None:
    lines = [
        {"id": record["id"], **record["said"], "gen_image_paths": [str(path) for path in paths]}
        for record, paths in zip(records, pictures, strict=True)
    ]
    (folder / METADATA).write_text(_json(lines), encoding="utf-8")


def _mjhq(record: Record, index: int) -> Path:
    return Path(record["category"], f"{record['id']}.png")


def _nothing(*_: object) -> None:
    """A layout without metadata."""


LAYOUTS: dict[str, Layout] = {
    "geneval": Layout(_geneval, _geneval_metadata),
    "imagereward": Layout(_imagereward, _imagereward_metadata),
    "mjhq": Layout(_mjhq, _nothing, single=True),
}


def layout_folder(folder: str | Path) -> StagedFolder:
    """Where `export_layout` writes: a new folder, or an earlier one of its kind."""
    return StagedFolder(folder, force=True, marker=MARKER)


def check_layout(name: str, said: Sequence[Record], count: int) -> None:
    """Raises `InputError` now for what `export_layout` would refuse after sampling."""
    records = _records(said)
    if LAYOUTS[name].single and count > len(records):
        raise InputError(
            f"export {name}: {count} images of {len(records)} prompts, but it has one for each; "
            f"give --count {len(records)} or fewer"
        )


def export_layout(
    samples: SampleSet, folder: str | Path, name: str, said: Sequence[Record]
) -> None:
    """Write all samples in a layout of `LAYOUTS`. said: what is known of every prompt of the pool,
    in its order, with a "prompt".

    The folder appears whole, and replaces an earlier one of this kind. Paths in metadata are those
    of the finished folder. Raises `InputError` for names that no file can have, `OutputError`."""
    check_layout(name, said, len(samples))
    layout, records, target = LAYOUTS[name], _records(said), Path(folder)
    pictures: list[list[Path]] = [[] for _ in records]
    with layout_folder(folder) as staging:
        for shard in samples.shards():
            for label, image in zip(map(int, shard.labels), shard.images, strict=True):
                place = layout.place(records[label], len(pictures[label]))
                pictures[label].append(target / place)
                (staging / place).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(staging / place)
        drawn = [number for number, paths in enumerate(pictures) if paths]
        layout.metadata(
            staging, [records[number] for number in drawn], [pictures[number] for number in drawn]
        )
        (staging / MARKER).write_text(_json(list(said)), encoding="utf-8")


def _records(said: Sequence[Record]) -> list[Record]:
    """Number, id and category of every prompt, and what its file says. Raises `InputError`."""
    found: list[Record] = [
        {
            "number": number,
            "id": str(record.get("id", f"{number:05}")),
            "category": str(record.get("category", "all")),
            "said": record,
        }
        for number, record in enumerate(said)
    ]
    for record in found:
        for field in ("id", "category"):
            if not NAME.fullmatch(record[field]):
                raise InputError(
                    f"prompt {record['number']}: {field} {record[field]!r:.60} cannot be the name "
                    "of a file; use letters, digits, '-', '_' and '.'"
                )
    twice = [name for name, count in Counter(record["id"] for record in found).items() if count > 1]
    if twice:
        raise InputError(f"prompts: id {twice[0]!r} stands for several; give each its own")
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
