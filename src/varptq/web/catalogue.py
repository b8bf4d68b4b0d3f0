"""What the studio may open: published models on this machine, and what lies under its folders.

The folders are searched anew each time, and only what is found can be opened, by its key. A path is
never made from what a page sends, and a symbolic link out of its folder is not listed. Nothing is
loaded here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from varptq.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from varptq.errors import CheckpointError, InputError
from varptq.files import is_whole
from varptq.hub import snapshot_at
from varptq.models.families import FAMILIES
from varptq.models.presets import PRESETS, resolve

MAX_DEPTH, MAX_FOLDERS = 4, 2000
CHECKPOINT_SUFFIXES = {".pth", ".safetensors"}
REPORT_FILE, ANALYSIS_FILE = "report.html", "analysis.json"


class Kind(StrEnum):
    """The kind of an entry."""

    float = "float"
    artifact = "artifact"
    report = "report"
    analysis = "analysis"


@dataclass(frozen=True)
class Entry:
    """One thing that can be picked. `key` is what a page sends; `files` are what it refers to:
    none for a published model, the folder of an artifact, report or analysis, or a transformer and
    its autoencoder."""

    key: str
    kind: Kind
    files: tuple[Path, ...] = ()

    @property
    def stamp(self) -> tuple[int, ...]:
        """Changes when the files do."""
        files = [f / CONFIG_FILE if self.kind is Kind.artifact else f for f in self.files]
        return tuple(file.stat().st_mtime_ns for file in files)


class Catalogue:
    """The entries under `folders` (name -> folder), and the published models on this machine.

    Raises `InputError` for a folder that does not exist.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders: dict[str, Path] = {}
        for folder in folders:
            root = Path(os.path.realpath(folder))
            if not root.is_dir():
                raise InputError(f"folder {str(folder)!r}: no such folder; give one that exists")
            if root not in self.folders.values():
                snapshot = snapshot_at(root)
                name = snapshot.name if snapshot else root.name or "root"
                self.folders[self._free_name(name)] = root

    def _free_name(self, name: str) -> str:
        """A folder with the name of a model gets "./" before it, as on the command line."""
        name = f"./{name}" if name in PRESETS else name
        names = (name, *(f"{name}-{number}" for number in range(2, len(self.folders) + 3)))
        return next(name for name in names if name not in self.folders)

    def entries(self, *kinds: Kind) -> list[Entry]:
        """All entries of these kinds, published models first."""
        found = [*_published(), *self._under_folders()]
        return [entry for entry in found if entry.kind in kinds]

    def find(self, key: object, *kinds: Kind) -> Entry:
        """The entry of that key. Raises `InputError` for anything that is not listed."""
        for entry in self.entries(*kinds):
            if entry.key == key:
                return entry
        wanted = " or ".join(kinds)
        if not key or not isinstance(key, str):
            raise InputError(f"{wanted}: nothing chosen; choose one from the list")
        raise InputError(
            f"{wanted} {key!r}: not in the folders of this studio; choose one from the list"
        )

    def _under_folders(self) -> Iterator[Entry]:
        for name, root in self.folders.items():
            snapshot = snapshot_at(root)
            # In the hub's cache files are links to contents that lie beside the snapshots.
            reach = snapshot.storage if snapshot else root
            for folder in _walk(root):
                inside = folder.relative_to(root).as_posix()
                key = name if inside == "." else f"{name}/{inside}"
                yield from _entries_in(folder, key, reach)


def _published() -> Iterator[Entry]:
    for name in PRESETS:
        try:
            resolve(name)
        except CheckpointError:
            continue  # not in the cache, and the studio downloads nothing
        yield Entry(name, Kind.float)


def _walk(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, without hidden ones and symbolic links."""
    line = [(root, 0)]
    for _ in range(MAX_FOLDERS):
        if not line:
            return
        folder, depth = line.pop(0)
        yield folder
        if depth == MAX_DEPTH:
            continue
        try:
            below = sorted(entry.name for entry in os.scandir(folder) if _is_open_folder(entry))
        except OSError:
            continue
        line += [(folder / name, depth + 1) for name in below]


def _is_open_folder(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)


def _entries_in(folder: Path, key: str, reach: Path) -> Iterator[Entry]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return
    if not is_whole(folder):
        return
    files = {name for name in names if _inside(folder / name, reach)}
    if {CONFIG_FILE, WEIGHTS_FILE} <= files:
        yield Entry(key, Kind.artifact, (folder,))
    if REPORT_FILE in files:
        yield Entry(key, Kind.report, (folder,))
    if ANALYSIS_FILE in files:
        yield Entry(key, Kind.analysis, (folder,))
    yield from _checkpoints(folder, key, [name for name in names if name in files])


def _inside(path: Path, reach: Path) -> bool:
    real = Path(os.path.realpath(path))
    return real.is_file() and real.is_relative_to(reach)


def _checkpoints(folder: Path, key: str, names: list[str]) -> Iterator[Entry]:
    """Two files of one folder that are called as a family's are a model."""
    weights = [name for name in names if Path(name).suffix in CHECKPOINT_SUFFIXES]
    for row in FAMILIES.values():
        if row.file_names is None:
            continue
        transformers, autoencoders = (
            [name for name in weights if pattern.match(name.lower())] for pattern in row.file_names
        )
        for name in transformers if autoencoders else []:
            yield Entry(f"{key}/{name}", Kind.float, (folder / name, folder / autoencoders[0]))
