"""Which files of a folder are its pictures, and in words what else lies there.

Folders below count, also behind links. Hidden files and folders do not, nor what systems put beside
pictures: resource forks of macOS, previews, checkpoints of notebooks. Whatever is left out is told.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from varptq.errors import InputError
from varptq.reading import read_header

# What programs call the formats that are read; which one a file is, its content says.
SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp"}
EXPECTED = "JPEG, PNG or WebP"
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
_SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}


def find_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures below `folder` by name, and sentences about what is no part of them.

    Raises `InputError` where there are none, or a folder cannot be looked into.
    """
    found = sorted(_walk(folder, set()))
    visible = [path for path in found if not _is_hidden(path.relative_to(folder))]
    pictures = [path for path in visible if _is_picture(path)]
    hidden = [path for path in found if _is_picture(path) and path not in set(visible)]
    others = Counter(path.suffix or "without a suffix" for path in visible if not _is_picture(path))
    left_out = [f"{count} {suffix}" for suffix, count in sorted(others.items())]
    if hidden:
        left_out.append(f"{len(hidden)} hidden ({hidden[0].relative_to(folder)})")
    notes = [f"left out {', '.join(left_out)}"] if left_out else []
    if not pictures:
        there = f" ({notes[0]})" if notes else ""
        raise InputError(f"images {folder}: no {EXPECTED} in this folder{there}; convert or add")
    return pictures, notes + _twice(pictures)


def common_size(folder: Path, files: Sequence[Path]) -> tuple[tuple[int, int], list[str]]:
    """(height, width) of all pictures, which are looked at but not decoded, and a sentence about
    their transparency. Raises `InputError` for one that cannot be read, or of another size."""
    transparent: list[Path] = []
    first = None
    for path in files:
        header = read_header(path)
        first = first or header
        if header.size != first.size:
            sizes = (
                f"{height} x {width} ({file.relative_to(folder)})"
                for (width, height), file in ((first.size, files[0]), (header.size, path))
            )
            raise InputError(f"images {folder}: of sizes {' and '.join(sizes)}, expected one")
        if header.transparent:
            transparent.append(path)
    assert first is not None
    notes = []
    if transparent:
        name = transparent[0].relative_to(folder)
        notes.append(
            f"{len(transparent)} with transparency ({name}), where they take the mean colour of "
            "what is opaque"
        )
    width, height = first.size
    return (height, width), notes


def _walk(folder: Path, above: set[str]) -> Iterator[Path]:
    """All files below. A link to a folder above it is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"images {folder}: cannot be listed ({error.strerror})") from None
    for entry in entries:
        if entry.is_dir():
            yield from _walk(Path(entry.path), above | {real})
        else:
            yield Path(entry.path)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_hidden(relative: Path) -> bool:
    """Whether a file, or a folder on the way to it, is one that people do not see."""
    parts = relative.parts
    dotted = any(part.startswith(".") for part in parts)
    return dotted or not _SYSTEM_FOLDERS.isdisjoint(parts) or parts[-1] in _SYSTEM_FILES


def _twice(pictures: Sequence[Path]) -> list[str]:
    """A sentence about pictures that differ in their suffix only."""
    stems: dict[Path, Path] = {}
    pairs = [
        (stems[stem], path)
        for path in pictures
        if stems.setdefault(stem := path.with_suffix(""), path) != path
    ]
    if not pairs:
        return []
    names = " and ".join(path.name for path in pairs[0])
    return [f"{len(pairs)} there twice ({names}), each counted"]
