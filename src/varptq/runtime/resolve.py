"""Which runtime executes a quantized model, decided before any weight is read.

    explicit name  >  environment variable VARPTQ_RUNTIME (for "auto")  >  the fastest that can

"simulated" computes in float on dequantized codes and executes every config; the others compute in
integers and name the layer that they cannot execute. An explicit name gives that runtime or an
error, never silently another; "auto" on the CPU is "cpu" if that executes the config, else
"simulated" with the reason. `fastest` decides for a model that is yet to be quantized (`foreseen`),
a quantized one, an artifact being loaded, and `varptq info`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from varptq.errors import InputError
from varptq.models.meta import on_meta
from varptq.models.transformer import Transformer, float_layout
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import set_theta
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
    """The runtime to use, why, and its kernels (None: simulated). fallback: "simulated" was taken
    because nothing faster can execute the config, not because it was asked for."""

    name: str
    reason: str
    kernels: Kernels | None = None
    fallback: bool = False

    @property
    def runs_on(self) -> str:
        """For people: "cpu", or "simulated, because ..."."""
        return f"{self.name}, because {self.reason}" if self.fallback else self.name


def asked_for(runtime: str = AUTO) -> str:
    """`runtime`, or the value of VARPTQ_RUNTIME instead of "auto": "auto" or one of `RUNTIMES`.

    Raises `InputError` for a name that does not exist."""
    if runtime != AUTO:
        return _checked(runtime, "runtime")
    forced = os.environ.get(ENVIRONMENT, "").strip()
    if forced in ("", AUTO):
        return AUTO
    return _checked(forced, f"environment variable {ENVIRONMENT}: runtime")


def resolve(var: Transformer, runtime: str = AUTO, device: str | torch.device = "cpu") -> Choice:
    """The runtime that executes the converted model `var`, which may be on the meta device.

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
    return fastest(var, device)


def fastest(var: Transformer, device: str | torch.device = "cpu") -> Choice:
    """What "auto" means for the converted model `var`; the environment is not asked."""
    device = torch.device(device)
    name = FASTEST.get(device.type)
    if name is None:
        reason = f"no integer runtime computes on {device.type}"
        return Choice(SIMULATED, reason, fallback=True)
    kernels, reason = _try(name, var, device)
    if kernels is None:
        return Choice(SIMULATED, f"runtime {name!r} cannot: {reason}", fallback=True)
    return Choice(name, f"the fastest that executes this config on {device.type}", kernels)


def foreseen(
    var: Transformer,
    config: QuantConfig,
    *,
    shift: bool = False,
    device: str | torch.device = "cpu",
) -> Choice:
    """`fastest` for the float model `var` once it is quantized by `config`, with shift-and-sum or
    without; reads only the architecture. Raises `ConfigError` as `convert` does."""
    with on_meta():
        quantized = convert(float_layout(var), config)
    set_theta(quantized, 1.0 if shift else None)
    return told(quantized, device)


def told(var: Transformer, device: str | torch.device = "cpu") -> Choice:
    """`fastest`, for reporting only: it does not warn that the native core is missing, as whoever
    computes with it will."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastest(var, device)


def survey(var: Transformer | None = None) -> dict[str, str]:
    """By runtime, why it cannot compute here (the model `var`) on its own kind of device; empty if
    it can."""
    found = {SIMULATED: ""}
    for name, entry in INTEGER.items():
        if entry.device == "cuda" and not torch.cuda.is_available():
            found[name] = "this machine has no CUDA device"
        else:
            found[name] = _try(name, var, torch.device(entry.device))[1]
    return found


def _try(name: str, var: Transformer | None, device: torch.device) -> tuple[Kernels | None, str]:
    """The kernels of a runtime, or None and the reason."""
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
