"""Checks the device and the dtype that a caller names, before anything is read."""

from __future__ import annotations

from typing import Any

import torch

from varptq.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DEVICES = "cpu, cuda or cuda:N"


def checked_device(device: Any) -> torch.device:
    """`device`, a name or a torch.device, if a tensor can be put there now.

    Raises `ConfigError`.
    """
    expected = f"device {str(device)!r}: expected {DEVICES}"
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        raise ConfigError(f"device {device!r}: expected {DEVICES}")
    if not isinstance(device, torch.device) and str(device).isdigit():
        device = f"cuda:{device}"
    try:
        found = torch.device(device)
    except (RuntimeError, ValueError):
        raise ConfigError(expected) from None
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        here = f"{count} CUDA devices are here" if count else "no CUDA device is here"
        raise ConfigError(f"{expected}, and {here}; use {'cuda:0' if count else 'cpu'}")
    if found.type == "meta" or (found.type == "cpu" and (found.index or 0) > 0):
        raise ConfigError(f"{expected}; use cpu")
    try:
        torch.empty(1, dtype=torch.float32, device=found)
    except (RuntimeError, NotImplementedError, AssertionError):
        raise ConfigError(f"{expected}, and {found.type} is not here; use cpu") from None
    return found


def checked_dtype(dtype: Any) -> torch.dtype:
    """`dtype`, a torch.dtype or its name, if models compute in it. Raises `ConfigError`."""
    name = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str | torch.dtype) and name in DTYPES:
        return DTYPES[name]
    raise ConfigError(
        f"dtype {str(dtype)!r}: expected a floating dtype, one of {', '.join(DTYPES)}; use float32"
    )
