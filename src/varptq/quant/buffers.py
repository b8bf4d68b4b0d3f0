"""Modules whose buffers keep their dtype, whatever the model they are in is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class TypedBuffers(nn.Module):
    """A module whose own buffers, codes and what gives them their values, follow the model to
    another device, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda` and `bfloat16` go through."""
        own = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        # Never cast, not even for a moment: a buffer may lie on a mapped file.
        self._buffers.update(dict.fromkeys(own))
        super()._apply(fn, recurse)
        for name, buffer in own.items():
            device = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device
            self._buffers[name] = buffer.to(device)
        return self
