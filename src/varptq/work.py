"""The pieces of a calibration or an evaluation that are finished: a run that was killed goes on.

    folder/work.json             what decides the result, thread count and model digest included
    folder/<piece>.safetensors   tensors and plain JSON facts, with the fingerprint of work.json
    folder/lock                  held by the process that works here

A piece is written in one step (files.py), and its content does not depend on the pieces that were
there before, so an interrupted run and a whole one end in the same bytes. Another work.json makes
the folder start over. Without a folder, pieces are kept in memory. Several processes share a
folder: the first makes what is made once, the rest is dealt (distributed.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from varptq.distributed import Ranks
from varptq.errors import ConfigError, OutputError
from varptq.files import utf8_name, write_atomic
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
    """Several as one; no name may hold a slash."""
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

    Entering locks the folder; raises `OutputError` where another process holds it or it cannot be
    made. `remove` drops the folder when its result is safe.
    """

    def __init__(self, folder: str | Path | None = None, ranks: Ranks | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.ranks = ranks or Ranks()
        if folder is None and self.ranks.size > 1:
            raise ConfigError(
                f"work folder: none given to {self.ranks.size} processes, expected one they share"
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
                # Nothing was begun, or all is done.
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.release(remove=False)
            self._lock = None

    def begin(self, identity: dict[str, Any], progress: Progress) -> None:
        """Keep the pieces of a run of this identity and remove those of any other; tells
        `progress` which it was. To be called before pieces are asked for."""
        text = json.dumps(identity, indent=1, sort_keys=True).encode() + b"\n"
        self._fingerprint = hashlib.sha256(text).hexdigest()
        if self.folder is None:
            return
        if self.ranks.first:
            progress(STAGE, 0, 1)
            found = self._claim(text, identity)
            if self._lock is not None and not self._lock.kept:
                found += ", without a lock: this file system has none, let no other run work here"
            progress(STAGE, 1, 1, found)
        self.ranks.barrier()

    def _claim(self, text: bytes, identity: dict[str, Any]) -> str:
        assert self.folder is not None
        manifest = self.folder / MANIFEST
        # What a killed process leaves of `files.write_atomic`.
        for leftover in self.folder.glob(".varptq-*"):
            leftover.unlink(missing_ok=True)
        pieces = list(self.folder.glob(f"*{SUFFIX}"))
        if manifest.is_file() and manifest.read_bytes() == text:
            return f"{self.folder}: goes on, {len(pieces)} pieces are there"
        reason = _difference(manifest, identity) if manifest.is_file() else ""
        manifest.unlink(missing_ok=True)
        for piece in pieces:
            piece.unlink()
        write_atomic(manifest, text)
        return f"{self.folder}: starts over, was {reason}" if reason else f"{self.folder}: new"

    def has(self, name: str) -> bool:
        """Whether a whole piece of this run is there."""
        if self.folder is None:
            return name in self._memory
        try:
            with utf8_name(self._path(name)) as path, safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("fingerprint") == self._fingerprint
        except (OSError, SafetensorError):
            # Damaged: it is a function of the fingerprint, so making it again loses nothing.
            return False

    def read(self, name: str, keys: Iterable[str] | None = None) -> Piece:
        """A piece that is there, with all its tensors or those of `keys`."""
        if self.folder is None:
            return self._memory[name]
        with utf8_name(self._path(name)) as path, safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            wanted = file.keys() if keys is None else keys
            return Piece({key: file.get_tensor(key) for key in wanted}, facts)

    def write(self, name: str, piece: Piece) -> None:
        """Keep a piece. Raises `OutputError` where it cannot be written."""
        if self.folder is None:
            self._memory[name] = piece
            return
        facts = json.dumps(piece.facts, allow_nan=False)
        tensors = {key: t.detach().cpu().contiguous() for key, t in piece.tensors.items()}
        metadata = {"fingerprint": self._fingerprint, "facts": facts}
        write_atomic(self._path(name), save(tensors, metadata))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those that are not there, the same list in every process: none begins before all have
        looked."""
        absent = [name for name in names if not self.has(name)]
        self.ranks.barrier()
        return absent

    def once(self, name: str, make: Callable[[], Piece]) -> Piece:
        """A piece made by the first process, if it is not there yet, and read by all."""
        if self.missing([name]) and self.ranks.first:
            self.write(name, make())
        self.ranks.barrier()
        return self.read(name)

    def each(self, names: Sequence[str], make: Callable[[int], Piece]) -> Iterator[Piece]:
        """make(0), make(1), ... in order, one `names` each: dealt to the processes, and given to
        all of them. Without a folder nothing is kept. To be read to its end."""
        if self.folder is None:
            yield from map(make, range(len(names)))
            return
        missing = set(self.missing(names))
        for index in self.ranks.share([i for i, name in enumerate(names) if name in missing]):
            self.write(names[index], make(index))
        self.ranks.barrier()
        yield from map(self.read, names)

    def drop(self, names: Iterable[str]) -> None:
        """Remove pieces that are used up."""
        if not self.ranks.first:
            return
        for name in names:
            self._memory.pop(name, None)
            if self.folder is not None:
                self._path(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Drop the folder, when every process is done with it."""
        self.ranks.barrier()
        if self.folder is not None and self.ranks.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}{SUFFIX}"


def _locked(folder: Path) -> Lock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        # All of a work folder goes when its run is done.
        if names and not names & {LOCK, MANIFEST}:
            raise OutputError(
                f"work folder {folder}: holds {min(names)!r} and is no work folder of a run; give "
                "another one (--work)"
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


def _difference(manifest: Path, identity: dict[str, Any]) -> str:
    """The first field in which the run that was here differs from this one."""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads(manifest.read_text())
        for name, value in identity.items():
            if found.get(name) != value:
                old = found.get(name)
                return f"of {name} {_brief(old, value)}, not {_brief(value, old)}"
    return "of another run"


def _brief(value: Any, other: Any) -> str:
    """The value, or of a mapping what differs from the other one."""
    if isinstance(value, dict) and isinstance(other, dict):
        return f"{ {k: v for k, v in value.items() if other.get(k) != v} }"[:120]
    return f"{value!r:.80}"
