"""Reads an architecture off the tensors of a checkpoint, for all families: shapes that must fit,
modules that must be there, the convolutions of an autoencoder, and strict loading.

Every failure is one `CheckpointError` naming the tensor; `what` opens the message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from varptq.errors import CheckpointError
from varptq.models.convolutions import IMAGE_CHANNELS


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about tensors begin with the file's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def shape_of(
    state: Mapping[str, Tensor], name: str, what: str, expected: tuple[int | None, ...]
) -> tuple[int, ...]:
    """Shape of a tensor that must be there and fit `expected`, where None stands for any size."""
    if name not in state:
        raise CheckpointError(f"{what}: tensor {name!r} is missing, is this a {what} checkpoint?")
    shape = tuple(state[name].shape)
    fits = len(shape) == len(expected) and all(
        size > 0 and want in (None, size) for size, want in zip(shape, expected, strict=True)
    )
    if not fits:
        shown = ", ".join("any" if want is None else str(want) for want in expected)
        raise CheckpointError(f"{what}: tensor {name!r} has shape {shape}, expected ({shown})")
    return shape


def count_of(state: Mapping[str, Tensor], prefix: str, what: str) -> int:
    """How many modules `prefix0.`, `prefix1.`, .. there are; their numbers must not skip one."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = {int(match[1]) for name in state if (match := pattern.match(name))}
    if not found or found != set(range(len(found))):
        missing = next(i for i in range(len(found) + 1) if i not in found)
        raise CheckpointError(
            f"{what}: tensors {prefix}{missing}.* are missing, is this a {what} checkpoint?"
        )
    return len(found)


def conv_fields(state: Mapping[str, Tensor], what: str, *groups: int) -> dict[str, Any]:
    """`ch`, `ch_mult` and `num_res_blocks` of a `ConvArch`. One of `groups`, into which its norms
    cut the channels, has to divide those of every level."""
    ch = shape_of(state, "encoder.conv_in.weight", what, (None, IMAGE_CHANNELS, 3, 3))[0]
    channels: list[int] = []
    for i in range(count_of(state, "encoder.down.", what)):
        name = f"encoder.down.{i}.block.0.conv1.weight"
        before = channels[-1] if channels else ch
        channels.append(shape_of(state, name, what, (None, before, 3, 3))[0])
        if channels[-1] % ch or all(channels[-1] % group for group in groups):
            raise CheckpointError(
                f"{what}: {name} has {channels[-1]} channels, expected a multiple of {ch} "
                f"(the first convolution's) and of {' or '.join(map(str, groups))}"
            )
    blocks = count_of(state, "encoder.down.0.block.", what)
    multiples = tuple(width // ch for width in channels)
    return {"ch": ch, "ch_mult": multiples, "num_res_blocks": blocks}


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Give `module` the tensors of `state`; every name and shape must fit. `what` opens messages.

    A module on the meta device takes the tensors themselves (their dtype too), another a copy.
    Raises `CheckpointError` naming the first tensor that does not fit.
    """
    state = dict(state)
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise CheckpointError(f"{what}: tensor {name!r} is missing")
        if state[name].shape != tensor.shape:
            found, shape = tuple(state[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{what}: tensor {name!r} has shape {found}, expected {shape}")
    unexpected = next((name for name in state if name not in expected), None)
    if unexpected is not None:
        raise CheckpointError(f"{what}: tensor {unexpected!r} is unexpected, this model has none")
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            # An index buffer keeps its integer dtype whatever the file stored it as.
            state[name] = state[name].to(tensor.dtype)
        elif not state[name].is_floating_point():
            raise CheckpointError(
                f"{what}: tensor {name!r} is {state[name].dtype}, expected floating point"
            )
    is_empty = any(tensor.is_meta for tensor in expected.values())
    module.load_state_dict(state, strict=True, assign=is_empty)
