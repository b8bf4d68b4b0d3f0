"""Finished pieces of a calibration or an evaluation, so that a run that was killed continues.

    folder/work.json             everything that determines the result, also threads and model
    digest folder/<piece>.safetensors   tensors and plain JSON facts, with the fingerprint of
    work.json folder/lock                  held by the process that works here

A piece is written in one step (files.py), and its content does not depend on earlier pieces, so an
interrupted run and an uninterrupted one end in the same bytes. Another work.json makes the folder
start over. Without a folder, pieces are kept in memory. Several processes share a folder: the first
makes what is made once, the rest is divided among them (distributed.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import filterfalse
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from varptq.distributed import Ranks
from varptq.errors import ConfigError, OutputError
from varptq.files import PREFIX, utf8_name, write_atomic
from varptq.locks import HeldError, Lock
from varptq.progress import Progress

MANIFEST, LOCK, SUFFIX = "work.json", "lock", ".safetensors"
STAGE = "work folder"


@dataclass(frozen=True)
class Piece:
    """Tensors by name, and facts: plain JSON values."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def pack(pieces: Mapping[str, Piece]) -> Piece:
    """Several pieces as one; names must not contain a slash."""
    tensors = {f"{name}/{k}": t for name, p in pieces.items() for k, t in p.tensors.items()}
    return Piece(tensors, {name: piece.facts for name, piece in pieces.items()})


def unpack(whole: Piece) -> dict[str, Piece]:
    """The inverse of `pack`."""
    found = {name: Piece(facts=facts) for name, facts in whole.facts.items()}
    for key, tensor in whole.tensors.items():
        name, _, own = key.partition("/")
        found[name].tensors[own] = tensor
    return found


class Work:
    """Pieces by name, in `folder` or in memory.

        with Work(folder) as work:
            work.begin(identity, progress)
            piece = work.once("theta", make)

    Entering locks the folder; raises `OutputError` if another process holds it or it cannot be
    made. `remove` deletes the folder once its result is safe.
    """

    def __init__(self, folder: str | Path | None = None, ranks: Ranks | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.ranks = ranks or Ranks()
        if folder is None and self.ranks.size > 1:
            raise ConfigError(
                f"work folder: none given to {self.ranks.size} processes, expected a shared one"
            )
        self._fingerprint = ""
        self._memory: dict[str, Piece] = {}
        self._lock: Lock | None = None

    def __enter__(self) -> Self:
        if self.folder is not None and self.ranks.first:
            self._lock = _locked(self.folder)
        self.ranks.barrier()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            assert self.folder is not None
            if not (self.folder / MANIFEST).exists():
                # Nothing was started, or all is done.
                _emptied(self.folder)
            self._lock.release(remove=False)
            self._lock = None

    def begin(self, identity: dict[str, Any], progress: Progress) -> None:
        """Keep the pieces of a run of this identity and remove those of any other; reports to
        `progress` which it was. Call it before asking for pieces."""
        text = json.dumps(identity, indent=1, sort_keys=True).encode() + b"\n"
        self._fingerprint = hashlib.sha256(text).hexdigest()
        if self.folder is None:
            return
        if self.ranks.first:
            progress(STAGE, 0, 1)
            found = self._claim(text, identity)
            if self._lock is not None and not self._lock.kept:
                found += ", without a lock: this file system has none, so start no other run here"
            progress(STAGE, 1, 1, found)
        self.ranks.barrier()

    def _claim(self, text: bytes, identity: dict[str, Any]) -> str:
        assert self.folder is not None
        manifest = self.folder / MANIFEST
        # Temporary files of `files.write_atomic` that a killed process left behind.
        for leftover in self.folder.glob(".varptq-*"):
            leftover.unlink(missing_ok=True)
        pieces = list(self.folder.glob(f"*{SUFFIX}"))
        if manifest.is_file() and manifest.read_bytes() == text:
            return f"{self.folder}: continues, {len(pieces)} pieces are finished"
        reason = _difference(manifest, identity) if manifest.is_file() else ""
        manifest.unlink(missing_ok=True)
        for piece in pieces:
            piece.unlink()
        write_atomic(manifest, text)
        return f"{self.folder}: starts over, was {reason}" if reason else f"{self.folder}: new"

    def has(self, name: str) -> bool:
        """Whether a complete piece of this run exists."""
        if self.folder is None:
            return name in self._memory
        try:
            with utf8_name(self._path(name)) as path, safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("fingerprint") == self._fingerprint
        except (OSError, SafetensorError):
            # Damaged; the piece can be made again with the same content.
            return False

    def read(self, name: str, keys: Iterable[str] | None = None) -> Piece:
        """An existing piece, with all its tensors or those of `keys`."""
        if self.folder is None:
            return self._memory[name]
        with utf8_name(self._path(name)) as path, safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            wanted = file.keys() if keys is None else keys
            return Piece({key: file.get_tensor(key) for key in wanted}, facts)

    def write(self, name: str, piece: Piece) -> None:
        """Keep a piece. Raises `OutputError` if it cannot be written."""
        if self.folder is None:
            self._memory[name] = piece
            return
        facts = json.dumps(piece.facts, allow_nan=False)
        tensors = {key: t.detach().cpu().contiguous() for key, t in piece.tensors.items()}
        metadata = {"fingerprint": self._fingerprint, "facts": facts}
        write_atomic(self._path(name), save(tensors, metadata))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names of missing pieces, the same list in every process, as none starts before all have
        looked."""
        absent = [name for name in names if not self.has(name)]
        self.ranks.barrier()
        return absent

    def once(self, name: str, make: Callable[[], Piece]) -> Piece:
        """A piece that the first process makes if it is missing, and all read."""
        if self.missing([name]) and self.ranks.first:
            self.write(name, make())
        self.ranks.barrier()
        return self.read(name)

    def each(self, names: Sequence[str], make: Callable[[int], Piece]) -> Iterator[Piece]:
        """make(0), make(1), ... in order, one per name: divided among the processes, and returned
        to all of them. Without a folder nothing is kept. Must be read to its end."""
        if self.folder is None:
            yield from map(make, range(len(names)))
            return
        missing = set(self.missing(names))
        for index in self.ranks.share([i for i, name in enumerate(names) if name in missing]):
            self.write(names[index], make(index))
        self.ranks.barrier()
        yield from map(self.read, names)

    def drop(self, names: Iterable[str]) -> None:
        """Remove pieces that are not needed any more."""
        if not self.ranks.first:
            return
        for name in names:
            self._memory.pop(name, None)
            if self.folder is not None:
                self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder, when every process is done with it."""
        self.ranks.barrier()
        if self.folder is not None and self.ranks.first:
            _emptied(self.folder)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{SUFFIX}"


def _locked(folder: Path) -> Lock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        if foreign := names if not names & {LOCK, MANIFEST} else set(filterfalse(_is_ours, names)):
            raise OutputError(
                f"work folder {folder}: holds {min(foreign)!r} and is no work folder of a run; "
                "give another one (--work)"
            )
        return Lock(folder / LOCK)
    except OSError as error:
        raise OutputError(
            f"work folder {folder}: cannot be made ({error.strerror}); give another place (--work)"
        ) from None
    except HeldError as error:
        raise OutputError(
            f"work folder {folder}: process {error.owner} is working there; wait for it or give "
            "another folder (--work)"
        ) from None


def _is_ours(name: str) -> bool:
    """Whether it is the name of a file of a work folder."""
    return name in {LOCK, MANIFEST} or name.endswith(SUFFIX) or name.startswith(PREFIX)


def _emptied(folder: Path) -> None:
    """Delete a work folder, but no file that somebody else put there meanwhile."""
    with suppress(OSError):
        ours = [path for path in folder.iterdir() if _is_ours(path.name)]
        # What tells it for a work folder goes last.
        for path in sorted(ours, key=lambda path: path.name in {LOCK, MANIFEST}):
            path.unlink()
        folder.rmdir()


def _difference(manifest: Path, identity: dict[str, Any]) -> str:
    """The first field in which the earlier run differs from this one."""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads(manifest.read_text())
        for name, value in identity.items():
            if found.get(name) != value:
                old = found.get(name)
                return f"of {name} {brief(old, value)}, not {brief(value, old)}"
    return "of another run"


def brief(value: Any, other: Any) -> str:
    """The value, or for a mapping the entries that differ from the other one."""
    if isinstance(value, dict) and isinstance(other, dict):
        return f"{ {k: v for k, v in value.items() if other.get(k) != v} }"[:120]
    return f"{value!r:.80}"
