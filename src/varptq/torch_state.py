"""Keep the caller's torch settings out of the arithmetic of our calls.

    @plain_torch()
    def verb(...): ...

Grad mode, inference mode, autocast and the default device belong to a thread; they are set aside
during the call. So is a reduced precision of float32 products, which belongs to the process: other
threads get slower products meanwhile, never other types. The default dtype belongs to the process
too, and changing it would affect tensors that other threads make. Hence every tensor of ours names
its dtype (tests/test_architecture.py), and its device if the code may be called from outside a
verb.

Where other programs need the cores, its threads wait for each other without spinning (busy.py).

A forked child computes on one thread: the OpenMP threads of its parent do not exist there, and
using them would hang.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from varptq.busy import beside_others

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
FULL, REDUCED = "ieee", ("bf16", "tf32")


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as in a fresh program, during a block; also a decorator."""
    if _in_child:
        _one_thread()
    with ExitStack() as stack:
        # This also turns gradients on, however they were turned off.
        stack.enter_context(torch.inference_mode(False))
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_precision)
        stack.enter_context(beside_others(torch.get_num_threads()))
        yield


class _FullPrecision:
    """Full float32 products while at least one thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._reduced: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._reduced = _reduced()
                for backend, _ in self._reduced:
                    backend.fp32_precision = FULL

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for backend, precision in self._reduced:
                    backend.fp32_precision = precision


class _Legacy:
    """The single switch of torch before 2.9, under the name of the later ones."""

    @property
    def fp32_precision(self) -> str:
        found = torch.get_float32_matmul_precision()
        return FULL if found == "highest" else {"high": "tf32", "medium": "bf16"}[found]

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        names = {FULL: "highest", "tf32": "high", "bf16": "medium"}
        torch.set_float32_matmul_precision(names[value])


def _reduced() -> list[tuple[Any, str]]:
    """Where float32 is computed in reduced precision now, and in which. cuDNN's convolutions do not
    count: TF32 is torch's own default there."""
    backends = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        places: list[Any] = [_Legacy()]
    else:
        mkldnn: Any = backends.mkldnn
        places = [mkldnn.matmul, mkldnn.conv, backends.cuda.matmul]
    return [(at, at.fp32_precision) for at in places if at.fp32_precision in REDUCED]


_precision = _FullPrecision()
_in_child = False


def _forked() -> None:
    """In the child: `_precision` may be held by a thread that does not exist there."""
    global _in_child, _precision
    _in_child, _precision = True, _FullPrecision()
    _one_thread()


def _one_thread() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_forked)
