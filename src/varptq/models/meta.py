"""Modules as shapes alone: on the meta device tensors have shapes and dtypes, but no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _WithoutInit(TorchFunctionMode):
    """Make modules without initial values: there are none, but torch would load its compiler to
    compute them, which takes longer than all the rest of a start."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Whatever is made while it lasts is on the meta device and has no values."""
    with torch.device("meta"), _WithoutInit():
        yield
