"""Which files of a folder are its pictures, and a description of the others.

Subfolders count, also behind links. Hidden files and folders do not, nor what systems put beside
pictures: resource forks of macOS, previews, checkpoints of notebooks. Whatever is left out is
reported.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from varptq.errors import InputError
from varptq.reading import read_header

# Usual suffixes of the formats that are read; the format of a file is taken from its content.
SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp"}
EXPECTED = "JPEG, PNG or WebP"
# How many of the suffixes left out are named, the most common first.
NAMED = 6
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
_SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}


def find_pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures below `folder` by name, and sentences about the other files.

    Raises `InputError` if there are none, or if a folder cannot be listed.
    """
    pictures, hidden, others = [], [], Counter[str]()
    for path in sorted(_walk(folder, set())):
        is_picture = path.suffix.lower() in SUFFIXES
        if _is_hidden(path.relative_to(folder)):
            hidden += [path] if is_picture else []
        elif is_picture:
            pictures.append(path)
        else:
            others[path.suffix or "without a suffix"] += 1
    named = dict(others.most_common(NAMED))
    left_out = [f"{count} {suffix}" for suffix, count in sorted(named.items())]
    if more := others.total() - sum(named.values()):
        left_out.append(f"{more} others")
    if hidden:
        left_out.append(f"{len(hidden)} hidden ({hidden[0].relative_to(folder)})")
    notes = [f"left out {', '.join(left_out)}"] if left_out else []
    if not pictures:
        there = f" ({notes[0]})" if notes else ""
        raise InputError(
            f"images {folder}: no {EXPECTED} in this folder{there}; convert or add some"
        )
    return pictures, notes + _twice(pictures)


def common_size(folder: Path, files: Sequence[Path]) -> tuple[tuple[int, int], list[str]]:
    """(height, width) of all pictures, from their headers alone, and a sentence about transparency.
    Raises `InputError` for a picture that cannot be read or has another size."""
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
            raise InputError(
                f"images {folder}: of sizes {' and '.join(sizes)}, expected one size; resize them"
            )
        if header.transparent:
            transparent.append(path)
    assert first is not None
    notes = []
    if transparent:
        name = transparent[0].relative_to(folder)
        notes.append(
            f"{len(transparent)} with transparency ({name}), where they get the mean colour of "
            "the opaque pixels"
        )
    width, height = first.size
    return (height, width), notes


def _walk(folder: Path, above: set[str]) -> Iterator[Path]:
    """All files below, and dangling links, but no pipes or devices. A link to a folder above it is
    not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"images {folder}: cannot be listed ({error.strerror})") from None
    for entry in entries:
        if os.path.isdir(entry.path):
            yield from _walk(Path(entry.path), above | {real})
        elif os.path.isfile(entry.path) or entry.is_symlink():
            yield Path(entry.path)


def _is_hidden(relative: Path) -> bool:
    """Whether a file, or a folder on the way to it, is hidden."""
    parts = relative.parts
    dotted = any(part.startswith(".") for part in parts)
    return dotted or not _SYSTEM_FOLDERS.isdisjoint(parts) or parts[-1] in _SYSTEM_FILES


def _twice(pictures: Sequence[Path]) -> list[str]:
    """A sentence about pictures whose names differ only in the suffix."""
    stems: dict[Path, Path] = {}
    pairs = [
        (stems[stem], path)
        for path in pictures
        if stems.setdefault(stem := path.with_suffix(""), path) != path
    ]
    if not pairs:
        return []
    names = " and ".join(path.name for path in pairs[0])
    return [f"{len(pairs)} twice under two suffixes ({names}), each counted"]
