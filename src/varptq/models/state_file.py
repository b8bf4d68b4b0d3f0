"""Checkpoint files: bytes on disk to a dict of finite tensors, and to a SHA-256.

    shards.py      file, index or folder -> content; file_kinds.py reads one file
    wrappers.py    content -> the state dict that is meant, under plain names
    here           -> finite tensors of one dtype in memory of their own

Every failure is one line naming file and tensor. What the tensors mean is `checkpoint.py`; nothing
is written or downloaded here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varptq.errors import CheckpointError, NonFiniteError
from varptq.models.file_pages import FilePages
from varptq.models.shards import files_of, read_all
from varptq.models.wrappers import Part, select

State = dict[str, Tensor]

MASK = "attn_bias_for_masking"
# How a quantized weight is called in an artifact.
PACKED = ".weight_packed"
# Bytes of a tensor below which to find out whose its pages are takes longer than to hash it.
LARGE = 2**20


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises `CheckpointError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def networks_sha256(*networks: nn.Module, more: bytes = b"") -> str:
    """SHA-256 of all tensors of the networks with names and dtypes, and of `more` after them."""
    state, pages = hashlib.sha256(), FilePages()
    for network in networks:
        for name, tensor in network.state_dict().items():
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            if tensor.nbytes >= LARGE:
                pages.release(tensor)
    state.update(more)
    return state.hexdigest()


def source_sha256(path: str | Path) -> str:
    """SHA-256 of a checkpoint: of its file, or of the digests of its index and shards.

    Raises `CheckpointError`.
    """
    digests = [file_sha256(file) for file in files_of(path)]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def read_state(
    path: str | Path, part: Part | None = None, dtype: torch.dtype | None = torch.float32
) -> State:
    """The tensors of one model from a checkpoint: CPU, own contiguous memory, floating ones as
    `dtype`. With None they stay as they are, on the mapped file where it can be mapped, and whoever
    reads them finds what is not finite.

    path: a file, an index of shards, or a folder with one of these in it. `part` says which model
    is meant in a file that holds more, and takes what wrappers added off the names (wrappers.py);
    None is another network, whose names stay as they are.

    Raises `CheckpointError` (missing, empty, truncated, damaged, foreign, not only tensors, two of
    a kind) and `NonFiniteError` (NaN or infinity; the -inf of the attention mask is allowed).
    """
    path = Path(path)
    state = _check_tensors(select(read_all(path), part, path), path)
    if dtype is None:
        return state
    return {name: _converted(name, tensor, dtype, path) for name, tensor in state.items()}


def _check_tensors(content: Any, path: Path) -> State:
    """A non-empty dict of names to plain dense tensors, or one line about the first other thing."""
    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: holds {kind}, expected a state dict of tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, expected only tensors by name"
            )
        if name.endswith(PACKED):
            raise CheckpointError(
                f"{path}: tensor {name!r} is codes, this is an artifact: load its folder with "
                "varptq.load"
            )
        if value.is_meta:
            raise CheckpointError(
                f"{path}: tensor {name!r} has no values (device meta): save it from a device"
            )
        # A view that repeats its storage could claim terabytes in a small file.
        dense = value.layout == torch.strided and value.device.type == "cpu"
        odd = value.is_complex() or value.is_quantized or not dense
        if odd or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor")
    return {name: value.detach() for name, value in content.items()}


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    # A copy, because a mapped file that changes or shrinks would take the model with it.
    # Contiguous, so that two files with the same numbers take the same way through the kernels.
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    converted = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    finite = converted.isfinite()
    if name.split(".")[-1] == MASK:
        finite |= converted == -torch.inf
    if not finite.all():
        raise NonFiniteError(
            f"{path}: tensor {name!r} holds NaN or infinity, expected finite numbers as {dtype}"
        )
    return converted
