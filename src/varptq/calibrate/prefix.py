"""The quantized model beside the float one while units are walked: what each unit reads behind the
layers that are quantized already, all rows and scales at once.

It costs a pass of a stage for every unit of it and one more, and the memory of two streams. Units
then depend on those before, so every process has to solve all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from varptq.calibrate.unit_inputs import TokensAndMore
from varptq.models.reading import listening
from varptq.models.seams import spans_of

if TYPE_CHECKING:
    from varptq.calibrate.record import Recorder, Storage, Unit
    from varptq.models.transformer import Transformer


class HeardError(Exception):
    """Raised once a module's input is known, so that the rest of the pass does not run."""


Arguments = tuple[Any, ...]


def heard(
    module: nn.Module, run: Callable[[], Any], enough: Callable[[Arguments], bool]
) -> list[Arguments]:
    """What `run` calls `module` with, up to the call that is `enough`; it goes no further."""
    found: list[Arguments] = []

    def hear(_: str, *arguments: Any) -> None:
        found.append(arguments)
        if enough(arguments):
            raise HeardError

    with listening({"": module}, hear), suppress(HeardError):
        run()
    return found


class Prefix:
    """`residual` (rows, L, C) float32 is what enters the present stage of the quantized model."""

    def __init__(self, recorder: Recorder, quantized: Transformer, storage: Storage) -> None:
        self._recorder, self._quantized = recorder, quantized
        self.residual = recorder.first_residual(quantized, storage, "prefix")
        self._inputs = storage.empty("behind", tuple(self.residual.shape))

    @torch.no_grad()
    def behind(self, unit: Unit, index: int) -> Unit:
        """`unit`, of stage `index`, with its inputs in the quantized model."""
        for rows in self._recorder.batches():
            [(x, *_)] = heard(unit.module, lambda rows=rows: self._run(index, rows), lambda _: True)
            self._inputs[rows] = x.to("cpu", self._inputs.dtype)
        given = unit.inputs
        with_more = isinstance(given, TokensAndMore)
        found = replace(given, tokens=self._inputs) if with_more else self._inputs
        return replace(unit, behind=found)

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Go through stage `index`, all of whose units are final."""
        for rows in self._recorder.batches():
            self.residual[rows] = self._run(index, rows).float()

    def _run(self, index: int, rows: slice) -> Tensor:
        recorder = self._recorder
        stage = recorder.stages_of(self._quantized, rows)[index]
        x = self.residual[rows].to(recorder.pipe.device, recorder.pipe.dtype)
        return stage.run(x, spans_of(recorder.scales), None)
