"""A transformer with one block in memory at a time, the others on the files that they were mapped
from.

    files -> the block that computes next: copied, cast, folded -> forgotten when another one does

Passes, hooks and conversion see the modules of an ordinary float model. What is outside of the
blocks, and the vectors within them, are in memory always.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from varptq.errors import NonFiniteError
from varptq.models.blocks import Attention
from varptq.models.cross import CrossAttention
from varptq.models.file_pages import FilePages
from varptq.models.room import FileRoom
from varptq.models.seams import Gain, block_of
from varptq.models.transformer import Transformer, float_layout

# Changes a block in place: its modules by id, the ids of its parameters.
Change = Callable[[Collection[int], Collection[int]], None]


class OnDemand:
    """`var` computes what `stored` does, in `dtype` on `device`. What its blocks remember of a pass
    is in files below `spool_dir` (room.py).

    After `change(how)` it computes what `how` makes of its parts: it is called once for what is
    outside of the blocks, and for a block whenever that is brought.
    """

    def __init__(
        self,
        stored: Transformer,
        dtype: torch.dtype,
        device: torch.device,
        spool_dir: str | None = None,
    ) -> None:
        self.var = float_layout(stored)
        self._dtype, self._device = dtype, device
        self._present: int | None = None
        self._how: Change | None = None
        self._names = {id(p): name for name, p in self.var.named_parameters()}
        self._seen: set[int] = set()
        # What the parameters of each block hold while it is not there.
        self._absent: dict[int, dict[nn.Parameter, Tensor]] = {}
        for name, module in self.var.named_modules():
            self._fill(module, stored.get_submodule(name), block_of(f"{name}."))
        room = FileRoom(spool_dir)
        for module in self.var.modules():
            if isinstance(module, Attention | CrossAttention):
                module.room = room
        self.var.eval().requires_grad_(False)

    def _fill(self, module: nn.Module, stored: nn.Module, block: int | None) -> None:
        for key, buffer in stored.named_buffers(recurse=False):
            dtype = self._dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, key, buffer.to(self._device, dtype, copy=True))
        for key, tensor in stored.named_parameters(recurse=False):
            parameter = module.get_parameter(key)
            stays = block is not None and tensor.dim() == 2
            data = tensor.detach()
            own = nn.Parameter(data if stays else self._copied(data), requires_grad=False)
            self._names[id(own)] = self._names.pop(id(parameter))
            setattr(module, key, own)
            if block is None:
                self._check(own)
            else:
                self._absent.setdefault(block, {})[own] = own.data
        if block is not None:
            # Parts of a block are called without it, too.
            module.register_forward_pre_hook(lambda *_: self.bring(block))

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype, copy=True)

    def _check(self, parameter: nn.Parameter) -> None:
        if not bool(parameter.isfinite().all()):
            raise NonFiniteError(
                f"tensor {self._names[id(parameter)]}: holds NaN or infinity; repair the checkpoint"
            )

    def bring(self, block: int | None) -> None:
        """Have the tensors of this block in memory, and of no other; None is what is outside of the
        blocks, which is there. Raises `NonFiniteError` naming the first with NaN or infinity."""
        if block is None or block == self._present:
            return
        self.leave()
        self._present = block
        for parameter, stored in self._absent[block].items():
            parameter.data = self._copied(stored)
            if block not in self._seen:
                self._check(parameter)
        self._seen.add(block)
        if self._how is not None:
            self._how(*self._ids(block))

    def leave(self) -> None:
        """Forget the block that is there."""
        if self._present is None:
            return
        pages = FilePages()
        for parameter, stored in self._absent[self._present].items():
            parameter.data = stored
            pages.release(stored)
        for module in self.modules(self._present).values():
            if isinstance(module, Gain):
                module.weight = None
        self._present = None

    def weight(self, linear: nn.Linear) -> Tensor:
        """Of a Linear of `var`, its block brought."""
        self.bring(block_of(self._names[id(linear.weight)]))
        return linear.weight

    def part(self, name: str) -> nn.Module:
        """A submodule of `var`, its block brought."""
        self.bring(block_of(f"{name}."))
        return self.var.get_submodule(name)

    def modules(self, block: int | None) -> dict[str, nn.Module]:
        """All modules of a block by name, or all that are outside of the blocks."""
        named = self.var.named_modules()
        return {name: module for name, module in named if block_of(f"{name}.") == block}

    def change(self, how: Change) -> None:
        """Compute what `how` makes of the parts from here on."""
        self.leave()
        self._how = how
        how(*self._ids(None))

    def _ids(self, block: int | None) -> tuple[set[int], set[int]]:
        modules: list[Any] = list(self.modules(block).values())
        own = {id(p) for module in modules for p in module.parameters(recurse=False)}
        return set(map(id, modules)), own
