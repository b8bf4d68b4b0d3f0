"""Which runtime computes a quantized model: one question, answered once, before anything is loaded.

    explicit name  >  environment variable VARPTQ_RUNTIME (for "auto")  >  the default

"simulated" computes in float on dequantized codes. The names in `PLANNED` are reserved for integer
runtimes, so that a script that asks for one is told so instead of getting another in silence.
"""

from __future__ import annotations

import os

from varptq.errors import InputError

AUTO = "auto"
ENVIRONMENT = "VARPTQ_RUNTIME"
RUNTIMES = ("simulated",)
PLANNED = ("reference", "cpu", "cuda")


def resolve(runtime: str = AUTO) -> str:
    """The name of the runtime to use, one of `RUNTIMES`.

    "auto" takes what VARPTQ_RUNTIME says, and without it the default; any other name is taken as it
    is. Raises `InputError` for a name that does not exist or is not available.
    """
    if runtime != AUTO:
        return _checked(runtime, "runtime")
    forced = os.environ.get(ENVIRONMENT, "").strip()
    if forced in ("", AUTO):
        return RUNTIMES[0]
    return _checked(forced, f"environment variable {ENVIRONMENT}: runtime")


def _checked(name: str, what: str) -> str:
    if name in RUNTIMES:
        return name
    problem = "not available in this version" if name in PLANNED else "unknown"
    raise InputError(f"{what} {name!r}: {problem}; use one of {', '.join((AUTO, *RUNTIMES))}")
