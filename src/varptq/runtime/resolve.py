"""Which runtime computes a quantized model: one question, answered before any weight is read.

    explicit name  >  environment variable VARPTQ_RUNTIME (for "auto")  >  the fastest that can

"simulated" computes in float on dequantized codes, whatever the config says; the others compute in
integers and say by layer what they cannot execute. An explicit name is that runtime or an error,
never another in silence; "auto" on the CPU is "cpu" where that executes the config, else
"simulated", and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from varptq.errors import InputError
from varptq.models.transformer import Transformer
from varptq.runtime.convert import refusal
from varptq.runtime.kernels import Kernels

AUTO, SIMULATED = "auto", "simulated"
ENVIRONMENT = "VARPTQ_RUNTIME"


def _reference() -> Kernels:
    from varptq.runtime.reference import ReferenceKernels

    return ReferenceKernels()


def _cpu() -> Kernels:
    from varptq.runtime.cpu import cpu_kernels

    return cpu_kernels()


def _cuda() -> Kernels:
    try:
        from varptq.runtime.cuda.kernels import CudaKernels
    except ImportError as error:
        raise InputError(f"runtime 'cuda': needs Triton ({error}); use another runtime") from None
    return CudaKernels()


@dataclass(frozen=True)
class Entry:
    """One runtime on integers: the kind of device it computes on, and how to get its kernels."""

    device: str
    kernels: Callable[[], Kernels]


INTEGER = {
    "reference": Entry("cpu", _reference),
    "cpu": Entry("cpu", _cpu),
    "cuda": Entry("cuda", _cuda),
}
RUNTIMES = (SIMULATED, *INTEGER)
# What "auto" tries by the kind of device, before it computes "simulated".
FASTEST = {"cpu": "cpu", "cuda": "cuda"}


@dataclass(frozen=True)
class Choice:
    """The runtime to use, why, and its kernels (None: simulated)."""

    name: str
    reason: str
    kernels: Kernels | None = None


def asked_for(runtime: str = AUTO) -> str:
    """`runtime`, or what VARPTQ_RUNTIME says in the place of "auto": "auto" or one of `RUNTIMES`.

    Raises `InputError` for a name that does not exist."""
    if runtime != AUTO:
        return _checked(runtime, "runtime")
    forced = os.environ.get(ENVIRONMENT, "").strip()
    if forced in ("", AUTO):
        return AUTO
    return _checked(forced, f"environment variable {ENVIRONMENT}: runtime")


def resolve(var: Transformer, runtime: str = AUTO, device: str | torch.device = "cpu") -> Choice:
    """Who computes the converted model `var`, which may be on the meta device.

    Raises `InputError` for an explicit runtime that does not exist, does not compute on `device`,
    or does not execute a layer of the config.
    """
    name, device = asked_for(runtime), torch.device(device)
    if name == SIMULATED:
        return Choice(SIMULATED, "asked for")
    if name != AUTO:
        kernels, reason = _try(name, var, device)
        if kernels is None:
            raise InputError(f"runtime {name!r}: {reason}; use runtime simulated")
        return Choice(name, "asked for", kernels)
    fastest = FASTEST.get(device.type)
    if fastest is None:
        return Choice(SIMULATED, f"no integer runtime computes on {device.type}")
    kernels, reason = _try(fastest, var, device)
    if kernels is None:
        return Choice(SIMULATED, f"runtime {fastest!r} cannot: {reason}")
    return Choice(fastest, f"the fastest that executes this config on {device.type}", kernels)


def survey(var: Transformer | None = None) -> dict[str, str]:
    """Why each runtime cannot compute here (the model `var`), on its own kind of device; empty
    where it can."""
    found = {SIMULATED: ""}
    for name, entry in INTEGER.items():
        if entry.device == "cuda" and not torch.cuda.is_available():
            found[name] = "no CUDA device is here"
        else:
            found[name] = _try(name, var, torch.device(entry.device))[1]
    return found


def _try(name: str, var: Transformer | None, device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels of a runtime, or None and why not."""
    entry = INTEGER[name]
    if device.type != entry.device:
        return None, f"computes on {entry.device}, the device is {device.type}"
    try:
        kernels = entry.kernels()
    except InputError as error:
        return None, str(error).removeprefix(f"runtime {name!r}: ").partition(";")[0]
    reason = refusal(var, kernels) if var is not None else None
    return (kernels, "") if reason is None else (None, reason)


def _checked(name: str, what: str) -> str:
    if name in RUNTIMES:
        return name
    raise InputError(f"{what} {name!r}: unknown; use one of {', '.join((AUTO, *RUNTIMES))}")
