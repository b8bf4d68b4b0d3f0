"""Reads one checkpoint file by its content, whatever the file is called.

The first bytes say what it is. A file of another kind is refused by that kind and what to do: a
git-lfs pointer, a web page, an archive around the checkpoint. Pickled code is never
run. state_file.py says what the content means.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varptq.errors import CheckpointError, is_out_of_memory
from varptq.files import utf8_name

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
SAFETENSORS_SUFFIX = ".safetensors"
AGAIN = "copy or download it again"
SAVE_STATE = "save its state dict alone with torch.save(model.state_dict(), ...)"
# Archives, the second empty; any protocol of pickle.
ZIP, PICKLE = (b"PK\x03\x04", b"PK\x05\x06"), b"\x80"
HEAD_BYTES = 1024
MAX_TEXT = 60

# Where a kind of file shows, its first bytes there, and what to say of it.
FOREIGN: tuple[tuple[int, bytes, str], ...] = (
    (
        0,
        b"version https://git-lfs",
        "is a git-lfs pointer, the tensors are not in it: run git lfs pull, or download the file",
    ),
    (0, b"\x1f\x8b", "is compressed with gzip: unpack it first (gunzip)"),
    (0, b"BZh", "is compressed with bzip2: unpack it first (bunzip2)"),
    (0, b"\xfd7zXZ", "is compressed with xz: unpack it first (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first (unzstd)"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first (7z x)"),
    (0, b"Rar!", "is a rar archive: unpack it first (unrar x)"),
    (257, b"ustar", "is a tar archive: unpack it first (tar xf) and give the checkpoint in it"),
    (0, b"\x93NUMPY", f"is one numpy array, expected a state dict of tensors: {SAVE_STATE}"),
    (0, b"\x89HDF", f"is an HDF5 file, expected a checkpoint of torch: {SAVE_STATE}"),
    (0, b"GGUF", f"is a GGUF file, expected a checkpoint of torch: {SAVE_STATE}"),
)


def read_content(path: Path) -> Any:
    """What a file of torch or safetensors holds, on the CPU; tensors may lie on the mapped file.

    Raises `CheckpointError` (missing, empty, truncated, damaged, foreign, not only tensors).
    """
    head = _head(path)
    _refuse_foreign(path, head)
    if _is_safetensors(head):
        return _read_safetensors(path)
    if head.startswith((*ZIP, PICKLE)):
        return _read_torch(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
    raise CheckpointError(f"{path}: unknown kind of checkpoint, expected one of {known}")


def _head(path: Path) -> bytes:
    """The first bytes of a file that can be read and is not empty."""
    try:
        if not path.exists():
            if path.is_symlink():
                raise CheckpointError(f"{path}: is a link to a file that is not there: {AGAIN}")
            raise CheckpointError(f"{path}: no such checkpoint file")
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a file, expected a checkpoint file")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r}: is no path ({error})") from None
    if not head:
        raise CheckpointError(f"{path}: is empty, {AGAIN}")
    return head


def _refuse_foreign(path: Path, head: bytes) -> None:
    for start, magic, what in FOREIGN:
        if head[start:].startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path}: is a web page, saved in the place of the file it speaks of: download it again"
        )
    text = head.decode("ascii", "replace")
    if re.fullmatch(r"[\t\r\n -~]{9,}", text):
        line = text.strip().partition("\n")[0][:MAX_TEXT]
        raise CheckpointError(f"{path}: is text ({line!r}), expected a checkpoint: {AGAIN}")
    if len(head) == HEAD_BYTES and not any(head):
        raise CheckpointError(f"{path}: begins with zeros, as half a download does: {AGAIN}")


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of length, then JSON. A length may begin as a pickle does, say that of 128 or 640
    bytes; its upper half is zero, and no pickle goes on like that."""
    return head[8:9] == b"{" and head[4:8] == bytes(4) and not head.startswith(ZIP)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: damaged, truncated or not a safetensors file ({reason}): {AGAIN}"
        ) from None


def _read_torch(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_zip(path)
    try:
        with utf8_name(path) as name, warnings.catch_warnings():
            # Old pickle protocols make torch warn; what it then cannot read raises anyway.
            warnings.simplefilter("ignore")
            if path.suffix != SAFETENSORS_SUFFIX:
                return torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
            with path.open("rb") as file:  # torch goes by the name of a path
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A foreign file fails anywhere in the unpickler: KeyError, EOFError, RuntimeError...
        blocked = re.search(r"[Uu]nsupported (?:class|global:? GLOBAL|GLOBAL) ([\w.]+)", str(error))
        if blocked:
            raise CheckpointError(
                f"{path}: refused, it asks for the Python object {blocked[1]!r}: expected tensors "
                "only, save the state dict alone"
            ) from None
        raise CheckpointError(
            f"{path}: damaged, truncated or not a torch checkpoint ({type(error).__name__}): "
            f"{AGAIN}"
        ) from None


def _check_zip(path: Path) -> None:
    """Refuse archives that torch did not write, and compare every record with its CRC: torch itself
    does not, and would return flipped bits, or what a mapped compressed record looks like."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_records(path, archive.infolist())
            damaged = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:
        # Besides BadZipFile: zlib's error, EOFError, NotImplementedError for unknown compression.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged archive ({reason}): {AGAIN}") from None
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, record {damaged!r} fails its checksum: {AGAIN}")


def _check_records(path: Path, records: list[zipfile.ZipInfo]) -> None:
    names = [record.filename for record in records]
    bare = {name.rpartition("/")[2] for name in names}
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{path}: is an archive of numpy arrays (npz), expected tensors of torch: save "
            "{name: torch.from_numpy(array)} with torch.save"
        )
    if "data.pkl" not in bare:
        shown = ", ".join(repr(name) for name in names[:3])
        raise CheckpointError(
            f"{path}: is a zip archive of {shown or 'nothing'}, not a checkpoint of torch: unpack "
            "it and give the file in it"
        )
    if "constants.pkl" in bare:
        raise CheckpointError(f"{path}: is a TorchScript program, expected tensors: {SAVE_STATE}")
    packed = next((r for r in records if r.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise CheckpointError(
            f"{path}: was zipped again, its record {packed.filename!r} is compressed (deflate): "
            "unpack it and zip the folder in it with zip -0 -r, or take the original file"
        )
