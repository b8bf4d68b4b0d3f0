"""Recording: one streaming pass that gives every unit its float inputs and targets.

The activations that enter stage i + 1 are computed from those that leave stage i, batch by batch,
all K scales at once; no image is generated again. Stored at any time are the residual stream and
the inputs and outputs of one stage's units. Units see float inputs, so they do not depend on each
other (paper: base pipeline; docs/method.md section 5).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.prefix import Prefix
from varptq.calibrate.samples import CalibrationSet
from varptq.calibrate.unit_inputs import Inputs, Texts, TokensAndMore
from varptq.errors import NonFiniteError, OutputError
from varptq.models.blocks import Attention
from varptq.models.cross import CrossAttention, TextGroup
from varptq.models.file_pages import mapped_empty
from varptq.models.pipeline import Pipeline
from varptq.models.reading import listening
from varptq.models.seams import (
    USUAL_TEXT,
    SeamLinear,
    Span,
    Stage,
    TokenLinear,
    linears_of,
    spans_of,
)
from varptq.models.transformer import Transformer

ROWS_PER_BATCH = 8
FLOAT_BYTES, HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Unit:
    """One part of the model whose rounding is chosen on its own.

    run maps a batch of inputs (rows, ...) through the quantized piece, `reference` through the
    float one; both move inputs to the model's device. If targets is None, `reference` computes
    them at every step (word_embed, the AdaLN layers, units that read texts alone, and a head whose
    outputs are too large to keep). token_weights (tokens,) weights the squared error of each
    position: 1 / l_k at scale k, so that every scale counts equally; None for units that see one
    vector per condition or a text, all of whose tokens count the same. float_module: the float
    piece. behind: the same inputs in the quantized model, where the walk follows it.
    """

    name: str
    module: nn.Module
    run: Callable[[Any], Tensor]
    reference: Callable[[Any], Tensor]
    inputs: Inputs
    targets: Tensor | None
    token_weights: Tensor | None
    float_module: nn.Module | None = None
    behind: Inputs | None = None

    @property
    def met(self) -> Inputs:
        """What the quantized piece is run on: the quantized model's inputs where they are known."""
        return self.inputs if self.behind is None else self.behind

    @property
    def sees_vectors(self) -> bool:
        """Whether a row is one vector."""
        return self.token_weights is None and isinstance(self.inputs, Tensor)

    def target(self, rows: Tensor) -> Tensor:
        """Float outputs of these rows, float32."""
        if self.targets is not None:
            return self.targets[rows].float()
        with torch.no_grad():
            return self.reference(self.inputs[rows]).float()


@dataclass(frozen=True)
class Storage:
    """Where recorded activations live: their dtype, and a folder when they do not fit in memory."""

    dtype: torch.dtype
    folder: Path | None

    @classmethod
    def plan(cls, numel: int, units: int, config: CalibrationConfig, stack: ExitStack) -> Storage:
        """float32 in memory if a stage's record fits, else bfloat16, else memory-mapped files.

        A record is the residual stream of `numel` numbers in float32, and inputs and targets of
        `units` units as large.

        The temporary folder lives as long as `stack`. Raises `OutputError` if it cannot be made or
        has too little room.
        """
        limit = config.memory_gb * 2**30
        as_float, as_half = record_bytes(numel, units)
        if as_float <= limit:
            return cls(torch.float32, None)
        if as_half <= limit:
            return cls(torch.bfloat16, None)
        return cls(torch.bfloat16, _spool(as_half, config.spool_dir, stack))

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.folder is None:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return mapped_empty(self.folder / f"{name}.bin", shape, dtype)


def record_bytes(numel: int, units: int) -> tuple[int, int]:
    """Of such a record with inputs and targets in float32, and in bfloat16."""
    as_float, as_half = (
        numel * (FLOAT_BYTES + 2 * units * width) for width in (FLOAT_BYTES, HALF_BYTES)
    )
    return as_float, as_half


def _spool(size: int, parent: str | None, stack: ExitStack) -> Path:
    """A temporary folder with room for `size` bytes, checked before anything is computed."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="varptq-", dir=parent)
        path = Path(stack.enter_context(folder))
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise OutputError(f"spool_dir {parent}: cannot be used ({error.strerror})") from None
    if size > free:
        raise OutputError(
            f"spool_dir {path.parent}: has {free / 2**30:.1f} GiB free, expected "
            f"{size / 2**30:.1f}; give another folder or take fewer samples"
        )
    return path


def scale_weights(spans: list[Span]) -> Tensor:
    """(tokens,) 1 / l_k for every token of scale k."""
    lengths = [span.length for span in spans]
    return torch.cat(
        [torch.full((n,), 1.0 / n, dtype=torch.float32, device="cpu") for n in lengths]
    )


class Recorder:
    """Walks the stages of the float model once and yields its units in model order.

    pipe: float pipeline; quantized: gives the module of the converted transformer that a unit runs,
    by name, when the unit is ready.
    """

    def __init__(
        self,
        pipe: Pipeline,
        quantized: Callable[[str], nn.Module],
        samples: CalibrationSet,
        config: CalibrationConfig,
    ) -> None:
        self.pipe, self.var, self.quantized = pipe, pipe.var, quantized
        self.config = config
        self.prompts = samples.prompts.guided()
        self.samples, self.num_rows = samples, len(self.prompts)
        self.scales = pipe.scales
        # The units do not depend on the condition.
        self.stages = self.stages_of(self.var, slice(0, 1))

    @torch.no_grad()
    def stages_of(self, var: Transformer, rows: slice | Tensor) -> list[Stage]:
        """The pass of `var`, the float transformer or the quantized one, for these rows."""
        return var.stages(var.condition(self.prompts[rows]))

    @property
    def most_units(self) -> int:
        """Units over tokens that a stage has, at most; the last stage's is not recorded."""
        return max(len(s.token_units) for s in self.stages if s.token_units != (s.name,))

    @property
    def numel(self) -> int:
        """Numbers in the residual stream of all rows."""
        return self.num_rows * self.scales.num_tokens * self.var.width

    def costs(self) -> dict[str, float]:
        """Names of all units in model order, with the multiply-adds of the Linears and products of
        one row, which is the cost of a step up to a factor."""
        tokens = self.scales.num_tokens

        def positions(linear: SeamLinear) -> int:
            if linear.reads == "text":
                return linear.tokens_per_image(self.scales)
            return 1 if linear.reads == "condition" else tokens

        def cost(name: str) -> float:
            modules = list(self.var.get_submodule(name).modules())
            total = sum(
                m.weight.numel() * positions(m) for m in modules if isinstance(m, SeamLinear)
            )
            for module in modules:
                if isinstance(module, Attention | CrossAttention):
                    keys = tokens if isinstance(module, Attention) else USUAL_TEXT
                    total += tokens * keys * module.num_heads * module.head_width
            return float(total)

        names = [*self.var.input_units()]
        for stage in self.stages:
            names += [*stage.condition_units, *stage.token_units]
        return {name: cost(name) for name in names}

    def units(
        self, wanted: Collection[str] | None = None, *, follow: Transformer | None = None
    ) -> Generator[Unit]:
        """Units as they become ready, or only those named in `wanted`. A stage reuses the storage
        of the one before, so use each unit before asking for the next. The pass ends after the
        last one. follow: the quantized transformer; units over tokens have their inputs in it,
        too, as it is when they are asked for (prefix.py)."""
        names = list(self.costs())
        left = names if wanted is None else [name for name in names if name in set(wanted)]
        last = names.index(left[-1]) if left else -1
        yield from self._walk(frozenset(left), frozenset(names[: last + 1]), follow)

    def _walk(
        self, wanted: frozenset[str], reached: frozenset[str], follow: Transformer | None
    ) -> Iterator[Unit]:
        """The units `wanted`, from a pass up to the last of `reached`."""
        with ExitStack() as stack:
            inputs = [name for name in self.var.input_units() if name in wanted]
            yield from map(self._input_unit, inputs)
            ends = [
                index
                for index, stage in enumerate(self.stages)
                if reached.intersection((*stage.condition_units, *stage.token_units))
            ]
            if not ends:
                return
            most = self.most_units
            storage = Storage.plan(self.numel, most + (follow is not None), self.config, stack)
            residual = self.first_residual(self.var, storage, "residual")
            prefix = None if follow is None else Prefix(self, follow, storage)
            records = storage.empty("stage", (2 * most, *residual.shape))
            for index in range(ends[-1] + 1):
                stage = self.stages[index]
                vectors = [name for name in stage.condition_units if name in wanted]
                yield from map(self._vector_unit, vectors)
                recorded = [name for name in stage.token_units if name in wanted]
                if stage.token_units == (stage.name,):
                    if recorded:
                        unit = self._last_unit(index, residual, records)
                        yield unit if prefix is None else replace(unit, behind=prefix.residual)
                    return
                self._advance(index, residual, records, recorded)
                for place, name in enumerate(recorded):
                    inputs, targets = records[2 * place], records[2 * place + 1]
                    unit = self._token_unit(index, name, inputs, targets)
                    yield unit if prefix is None else prefix.behind(unit, index)
                if prefix is not None:
                    prefix.advance(index)

    def batches(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, ROWS_PER_BATCH):
            yield slice(start, min(start + ROWS_PER_BATCH, self.num_rows))

    @torch.no_grad()
    def _input_unit(self, name: str) -> Unit:
        seam = self.var.get_submodule(name)
        if any(linear.reads == "text" for linear in linears_of(seam).values()):
            return self._text_unit(name)
        if not isinstance(seam, TokenLinear):
            return self._vector_unit(name)
        inputs = self.pipe.vae.teacher_inputs(self.samples.tokens)
        return self._unit(name, inputs.float(), None, spans_of(self.scales, seam.first_scale))

    def _vector_unit(self, name: str) -> Unit:
        """An AdaLN layer: it sees one vector per condition, and is calibrated on all of them."""
        return self._unit(name, self.var.condition_vectors(self.pipe.pool()), None, None)

    def _text_unit(self, name: str) -> Unit:
        """What is made of a text once per image: its outputs, a text's one after another."""

        @torch.no_grad()
        def groups(rows_R: Tensor) -> tuple[TextGroup, ...]:
            return self.var.texts(self.prompts[rows_R])

        def caller(piece: nn.Module) -> Callable[[tuple[TextGroup, ...]], Tensor]:
            return lambda texts: torch.cat([piece(text).flatten(0, -2) for _, text in texts])

        return self._made(name, caller, Texts(self.num_rows, groups), None, None)

    def _token_unit(self, index: int, name: str, inputs: Tensor, targets: Tensor) -> Unit:
        """A unit of stage `index`, with what it reads besides tokens."""
        stage, spans = self.stages[index], spans_of(self.scales)
        arguments = stage.arguments.get(name, ())
        if name not in stage.of_rows:
            return self._unit(name, inputs, targets, spans, arguments)
        device, dtype = self.pipe.device, self.pipe.dtype

        def of_rows(rows_R: Tensor) -> tuple[Any, ...]:
            return self.stages_of(self.var, rows_R)[index].arguments[name]

        def caller(piece: nn.Module) -> Callable[[tuple[Any, ...]], Tensor]:
            return lambda part: piece(part[0].to(device, dtype), spans, *part[1:])

        both = TokensAndMore(inputs, of_rows)
        return self._made(name, caller, both, targets, scale_weights(spans))

    def _unit(
        self,
        name: str,
        inputs: Tensor,
        targets: Tensor | None,
        spans: list[Span] | None,
        more: tuple[Any, ...] = (),
    ) -> Unit:
        device, dtype = self.pipe.device, self.pipe.dtype

        def caller(piece: nn.Module) -> Callable[[Tensor], Tensor]:
            arguments = () if spans is None else (spans, *more)
            return lambda x: piece(x.to(device, dtype), *arguments)

        weights = None if spans is None else scale_weights(spans)
        return self._made(name, caller, inputs, targets, weights)

    def _made(
        self,
        name: str,
        caller: Callable[[nn.Module], Callable[[Any], Tensor]],
        inputs: Inputs,
        targets: Tensor | None,
        weights: Tensor | None,
    ) -> Unit:
        module, reference = self.quantized(name), self.var.get_submodule(name)
        run, float_run = caller(module), caller(reference)
        return Unit(name, module, run, float_run, inputs, targets, weights, reference)

    @torch.no_grad()
    def first_residual(self, var: Transformer, storage: Storage, name: str) -> Tensor:
        """What enters the first stage of `var`, the float transformer or the quantized one."""
        shape = (self.num_rows, self.scales.num_tokens, self.var.width)
        residual = storage.empty(name, shape, torch.float32)
        for rows in self.batches():
            numbers = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")
            samples = numbers % len(self.samples.tokens)
            inputs = self.pipe.vae.teacher_inputs(self.samples.tokens[samples])
            condition = var.condition(self.prompts[rows])
            residual[rows] = var.embed(condition, inputs).float()
        return residual

    @torch.no_grad()
    def _advance(
        self, index: int, residual: Tensor, records: Tensor, recorded: Collection[str]
    ) -> None:
        """Run a float stage over all rows in place; keep the inputs and outputs of the submodules
        `recorded`."""
        spans = spans_of(self.scales)
        modules = {place: self.var.get_submodule(name) for place, name in enumerate(recorded)}
        for rows in self.batches():
            stage = self.stages_of(self.var, rows)[index]

            def keep(place: int, output: Tensor, x: Tensor, *_: Any, rows: slice = rows) -> None:
                records[2 * place, rows] = x.to("cpu", records.dtype)
                records[2 * place + 1, rows] = output.to("cpu", records.dtype)

            with listening(modules, keep, output=True):
                x = residual[rows].to(self.pipe.device, self.pipe.dtype)
                residual[rows] = stage.run(x, spans, None).float()
            if not bool(torch.isfinite(residual[rows]).all()):
                raise NonFiniteError(f"layer {stage.name}: float activations hold NaN or infinity")

    @torch.no_grad()
    def _last_unit(self, index: int, residual: Tensor, records: Tensor) -> Unit:
        """The last unit, whose input is the residual stream. Its outputs replace the records if
        they fit, which holds up to four entries per channel."""
        spans, targets = spans_of(self.scales), None
        name = self.stages[index].name
        linear = self.var.get_submodule(name)
        assert isinstance(linear, TokenLinear)
        shape = (*residual.shape[:2], linear.out_features)
        if math.prod(shape) <= records.numel():
            targets = records.flatten()[: math.prod(shape)].view(shape)
            for rows in self.batches():
                x = residual[rows].to(self.pipe.device, self.pipe.dtype)
                targets[rows] = linear(x, spans).to("cpu", targets.dtype)
        return self._unit(name, residual, targets, spans)
