"""Checks tensors before C gets their addresses: C trusts what it gets, and with a wrong dtype,
size or device it would read or write memory of others."""

from __future__ import annotations

import torch
from torch import Tensor

from varptq.errors import InputError

# Floats that the core reads and writes, by their number in src/varptq.h.
TYPES = {torch.float32: 0, torch.bfloat16: 1}


def pointer(t: Tensor, what: str, dtype: torch.dtype, *shape: int) -> int:
    """The address of a contiguous CPU tensor of this dtype and shape.

    Raises `InputError` for any other. The address keeps nothing alive: the caller does.
    """
    if t.dtype != dtype or t.shape != shape or not t.is_cpu or not t.is_contiguous():
        raise InputError(
            f"native core, {what}: {t.dtype} {tuple(t.shape)} on {t.device}, expected contiguous "
            f"{dtype} {shape} on cpu; leave dtype and device of a loaded model as they are"
        )
    return t.data_ptr()


def row_numbers(t: Tensor, what: str, tokens: int, table: Tensor) -> int:
    """The address of (tokens,) int32 numbers of rows that `table` has. Raises `InputError`."""
    address = pointer(t, what, torch.int32, tokens)
    low, high = map(int, torch.aminmax(t)) if tokens else (0, 0)
    if low < 0 or high >= len(table):
        raise InputError(f"native core, {what}: {low}..{high}, expected 0..{len(table) - 1}")
    return address


def per_token(rows: Tensor | None, tokens: int) -> Tensor | None:
    """Row numbers per token, one for all spread over the tokens."""
    if rows is not None and rows.numel() == 1 and tokens != 1:
        rows = rows.reshape(1).expand(tokens).contiguous()
    if rows is not None and rows.numel() != tokens:
        raise ValueError(f"{rows.numel()} row numbers for {tokens} tokens an image")
    return rows


def dense(x: Tensor, what: str, *shape: int) -> Tensor:
    """x of `shape` on the CPU as contiguous float32. Raises `InputError` for another shape or
    device."""
    if x.shape != shape or not x.is_cpu:
        raise InputError(
            f"native core, {what}: {tuple(x.shape)} on {x.device}, expected {shape} on cpu; leave "
            "the device of a loaded model as it is"
        )
    return x.detach().to(torch.float32).contiguous()
