"""Checkpoint files: bytes on disk to a dict of finite tensors, and to a SHA-256.

Reads `.pth`, `.pt`, `.ckpt` (never running pickled code) and `.safetensors`, plain or as upstream's
trainer wraps them. Every failure is one line naming file and tensor. What the tensors mean is
`checkpoint.py`; nothing is written or downloaded here.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from varptq.errors import CheckpointError, NonFiniteError, is_out_of_memory
from varptq.files import utf8_name

Part = Literal["var", "vae"]
State = dict[str, Tensor]

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
TRAINER_PARTS: dict[Part, str] = {"var": "var_wo_ddp", "vae": "vae_local"}
MASK = "attn_bias_for_masking"


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises `CheckpointError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def networks_sha256(*networks: nn.Module, more: bytes = b"") -> str:
    """SHA-256 of all tensors of the networks with names and dtypes, and of `more` after them."""
    state = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    state.update(more)
    return state.hexdigest()


def read_state(path: str | Path, part: Part, dtype: torch.dtype = torch.float32) -> State:
    """The tensors of one model from a checkpoint file: CPU, own memory, floating ones as `dtype`.

    `part` chooses the model inside a file of upstream's trainer, which holds both; files of one
    model are read as they are, with or without a `{"state_dict": ...}` around them.

    Raises `CheckpointError` (missing, empty, truncated, damaged, foreign, not only tensors) and
    `NonFiniteError` (NaN or infinity; the -inf of the attention mask is allowed).
    """
    path = Path(path)
    _check_readable(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        content: Any = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise CheckpointError(f"{path}: unknown kind of checkpoint, expected one of {known}")
    state = _check_tensors(_unwrap(content, part, path), path)
    return {name: _converted(name, tensor, dtype, path) for name, tensor in state.items()}


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file, expected a checkpoint file")
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if is_empty:
        raise CheckpointError(f"{path}: is empty, copy or download it again")


def _read_safetensors(path: Path) -> State:
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({reason})") from None


def _read_torch(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_zip(path)
    try:
        with utf8_name(path) as name, warnings.catch_warnings():
            # Old pickle protocols make torch warn; what it then cannot read raises anyway.
            warnings.simplefilter("ignore")
            return torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
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
            f"{path}: damaged, truncated or not a torch checkpoint ({type(error).__name__})"
        ) from None


def _check_zip(path: Path) -> None:
    """Compare every record with its CRC: torch itself does not, and would return flipped bits."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        # Besides BadZipFile: zlib's error, EOFError, NotImplementedError for unknown compression.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged archive ({reason})") from None
    if damaged is not None:
        raise CheckpointError(
            f"{path}: damaged, record {damaged!r} fails its checksum: copy or download it again"
        )


def _unwrap(content: Any, part: Part, path: Path) -> Any:
    """The state dict inside upstream's trainer file or a `{"state_dict": ...}`."""
    if isinstance(content, Mapping) and isinstance(content.get("trainer"), Mapping):
        trainer, name = content["trainer"], TRAINER_PARTS[part]
        if name not in trainer:
            raise CheckpointError(
                f"{path}: trainer checkpoint without {name!r}, found {list(trainer)}"
            )
        content = trainer[name]
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    return content


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
        # A view that repeats its storage could claim terabytes in a small file.
        dense = value.layout == torch.strided and value.device.type == "cpu"
        odd = value.is_complex() or value.is_quantized or not dense
        if odd or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {name!r} is not a plain dense tensor")
    return {name: value.detach() for name, value in content.items()}


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    # A copy, because a mapped file that changes or shrinks would take the model with it.
    if not tensor.is_floating_point():
        return tensor.clone()
    converted = tensor.to(dtype, copy=True)
    finite = converted.isfinite()
    if name.split(".")[-1] == MASK:
        finite |= converted == -torch.inf
    if not finite.all():
        raise NonFiniteError(
            f"{path}: tensor {name!r} holds NaN or infinity, expected finite numbers as {dtype}"
        )
    return converted
