"""What the studio may open: published models that are here, and what lies under its folders.

The folders are looked through anew each time; only what that finds can be opened, by its key. A
path is never made from what a page sends, and nothing that leaves its folder by a symbolic link is
listed. Nothing is loaded here.
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
from varptq.models.presets import PRESETS, resolve

MAX_DEPTH, MAX_FOLDERS = 4, 2000
CHECKPOINT_SUFFIXES = {".pth", ".safetensors"}
REPORT_FILE, ANALYSIS_FILE = "report.html", "analysis.json"


class Kind(StrEnum):
    """What an entry is."""

    float = "float"
    artifact = "artifact"
    report = "report"
    analysis = "analysis"


@dataclass(frozen=True)
class Entry:
    """One thing that can be picked. `key` is what a page sends; `files` are what it stands for:
    none for a published model, the folder of an artifact, report or analysis, or a transformer and
    its VQVAE."""

    key: str
    kind: Kind
    files: tuple[Path, ...] = ()

    @property
    def stamp(self) -> tuple[int, ...]:
        """Changes when the files do."""
        files = [f / CONFIG_FILE if self.kind is Kind.artifact else f for f in self.files]
        return tuple(file.stat().st_mtime_ns for file in files)


class Catalogue:
    """The entries under `folders` (name -> folder), and the published models that are here.

    Raises `InputError` for a folder that is not there.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.folders: dict[str, Path] = {}
        for folder in folders:
            root = Path(os.path.realpath(folder))
            if not root.is_dir():
                raise InputError(f"folder {str(folder)!r}: no such folder; give one that is there")
            if root not in self.folders.values():
                self.folders[self._free_name(root.name or "root")] = root

    def _free_name(self, name: str) -> str:
        """A folder called like a model is ./demo, as on the command line."""
        name = f"./{name}" if name in PRESETS else name
        names = (name, *(f"{name}-{number}" for number in range(2, len(self.folders) + 3)))
        return next(name for name in names if name not in self.folders)

    def entries(self, *kinds: Kind) -> list[Entry]:
        """Everything there is of these kinds, published models first."""
        found = [*_published(), *self._under_folders()]
        return [entry for entry in found if entry.kind in kinds]

    def find(self, key: object, *kinds: Kind) -> Entry:
        """The entry of that key. Raises `InputError` for anything that is not listed."""
        for entry in self.entries(*kinds):
            if entry.key == key:
                return entry
        wanted = " or ".join(kinds)
        if not key or not isinstance(key, str):
            raise InputError(f"{wanted}: nothing chosen; choose one of the list")
        raise InputError(
            f"{wanted} {key!r}: not under the folders of this studio; choose one of the list"
        )

    def _under_folders(self) -> Iterator[Entry]:
        for name, root in self.folders.items():
            for folder in _walk(root):
                inside = folder.relative_to(root).as_posix()
                key = name if inside == "." else f"{name}/{inside}"
                yield from _entries_in(folder, key, root)


def _published() -> Iterator[Entry]:
    for name in PRESETS:
        try:
            resolve(name)
        except CheckpointError:
            continue  # not in the cache, and the studio fetches nothing
        yield Entry(name, Kind.float)


def _walk(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, hidden ones and symbolic links left out."""
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


def _entries_in(folder: Path, key: str, root: Path) -> Iterator[Entry]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return
    if not is_whole(folder):
        return
    files = {name for name in names if _inside(folder / name, root)}
    if {CONFIG_FILE, WEIGHTS_FILE} <= files:
        yield Entry(key, Kind.artifact, (folder,))
    if REPORT_FILE in files:
        yield Entry(key, Kind.report, (folder,))
    if ANALYSIS_FILE in files:
        yield Entry(key, Kind.analysis, (folder,))
    yield from _checkpoints(folder, key, [name for name in names if name in files])


def _inside(path: Path, root: Path) -> bool:
    real = Path(os.path.realpath(path))
    return real.is_file() and real.is_relative_to(root)


def _checkpoints(folder: Path, key: str, names: list[str]) -> Iterator[Entry]:
    """A file called var... and one called vae... in one folder are a model."""
    weights = [name for name in names if Path(name).suffix in CHECKPOINT_SUFFIXES]
    vaes = [name for name in weights if name.lower().startswith("vae")]
    for name in weights:
        if name.lower().startswith("var") and vaes:
            yield Entry(f"{key}/{name}", Kind.float, (folder / name, folder / vaes[0]))
