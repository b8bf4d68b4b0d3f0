"""Where a pass keeps what its blocks remember from scale to scale, their keys and values.

In memory; or on files, where a model computes block by block: then in memory are those of the block
that computes, and what all blocks remember may be larger than memory, as their weights are.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from varptq.errors import OutputError
from varptq.models.file_pages import FilePages, mapped_empty


class Room:
    """Memory."""

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor to be filled, of the dtype and on the device of `like`."""
        return like.new_empty(shape)

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values, to be kept until the pass ends."""
        return tensor

    def enter(self, *tensors: Tensor) -> None:
        """Parts of what this room gave, about to be used or just filled."""


class FileRoom(Room):
    """Files below `folder` (None: the system's for temporary ones), which have no names and are
    gone with their tensors. What is entered stays in memory until something else is.

    Raises `OutputError` where the folder cannot be used or is full."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        # A block forgets its tensors when the pass ends, and their files go with them.
        self._entered: list[weakref.ref[Tensor]] = []

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            return super().empty(shape, like)
        try:
            with tempfile.TemporaryDirectory(prefix="varptq-", dir=self._folder) as folder:
                return mapped_empty(Path(folder) / "kept.bin", shape, like.dtype)
        except OSError as error:
            raise OutputError(
                f"spool_dir {self._folder}: cannot be used ({error.strerror}); give another folder"
            ) from None

    def keep(self, tensor: Tensor) -> Tensor:
        return self.empty(tuple(tensor.shape), tensor).copy_(tensor)

    def enter(self, *tensors: Tensor) -> None:
        before = [tensor for entered in self._entered if (tensor := entered()) is not None]
        if before:
            pages = FilePages()
            for tensor in before:
                # All of a file, whatever view of it was used.
                whole = torch.empty(0, dtype=tensor.dtype, device="cpu")
                pages.release(whole.set_(tensor.untyped_storage()))
        self._entered = [weakref.ref(tensor) for tensor in tensors]


MEMORY = Room()
