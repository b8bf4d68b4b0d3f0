"""Recording: one streaming pass that gives every unit its float inputs and targets.

Activations entering block i + 1 are computed from those leaving block i, batch by batch, all K
scales at once; no image is generated again. What is stored at any time is the residual stream plus
input and output of one block's two units. Units see float inputs, so they do not depend on each
other (paper: base pipeline; docs/method.md section 5).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet
from varptq.errors import NonFiniteError, OutputError
from varptq.files import utf8_name
from varptq.models.pipeline import Pipeline
from varptq.models.var import Block, Span, spans_of

ROWS_PER_BATCH = 8
KINDS = ("attn", "ffn")
RECORDED = ("attn.inputs", "attn.targets", "ffn.inputs", "ffn.targets")
SHARED_ADALN, HEAD_ADALN = "shared_ada_lin.1", "head_nm.ada_lin.1"
# A block's record per activation: residual in float32, two inputs and two targets in 4 or 2 bytes.
FLOAT_BYTES, HALF_BYTES = 4 + 4 * 4, 4 + 4 * 2


@dataclass(frozen=True)
class Unit:
    """One piece of the model whose rounding is learned on its own.

    run maps a batch of inputs (rows, ...) through the quantized piece, `reference` through the
    float one; both move inputs to the model's device. targets may be None: then `reference` is
    asked at every step (word_embed, the AdaLN layers, and a head whose outputs are too large to
    keep). token_weights (tokens,)
    says how much the squared error of a position counts: 1 / l_k at scale k, so every scale counts
    equally; None for units that see one vector per class.
    """

    name: str
    module: nn.Module
    run: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    inputs: Tensor
    targets: Tensor | None
    token_weights: Tensor | None

    def target(self, rows: Tensor) -> Tensor:
        """Float outputs of these rows, float32."""
        if self.targets is not None:
            return self.targets[rows].float()
        with torch.no_grad():
            return self.reference(self.inputs[rows].float()).float()


@dataclass(frozen=True)
class Storage:
    """Where recorded activations live: their dtype, and a folder when they do not fit in memory."""

    dtype: torch.dtype
    folder: Path | None

    @classmethod
    def plan(cls, numel: int, config: CalibrationConfig, stack: ExitStack) -> Storage:
        """float32 in memory if a block's record fits, else bfloat16, else memory-mapped files.

        The temporary folder lives as long as `stack`. Raises `OutputError` where it cannot be made.
        """
        limit = config.memory_gb * 2**30
        if numel * FLOAT_BYTES <= limit:
            return cls(torch.float32, None)
        if numel * HALF_BYTES <= limit:
            return cls(torch.bfloat16, None)
        return cls(torch.bfloat16, _spool(numel * HALF_BYTES, config.spool_dir, stack))

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if self.folder is None:
            return torch.empty(shape, dtype=dtype)
        numel = int(torch.Size(shape).numel())
        path = self.folder / f"{name}.bin"
        _reserve(path, numel * dtype.itemsize)
        with utf8_name(path) as file:
            return torch.from_file(str(file), shared=True, size=numel, dtype=dtype).view(shape)


def _spool(size: int, parent: str | None, stack: ExitStack) -> Path:
    """A temporary folder with room for `size` bytes: a mapped file on a full disk ends the process
    without an exception."""
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


def _reserve(path: Path, size: int) -> None:
    """A file that has its blocks: what `_spool` found free may be gone, or over a quota."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        raise OutputError(
            f"spool_dir {path.parent.parent}: cannot take {size / 2**30:.1f} GiB "
            f"({error.strerror}); give another folder or take fewer samples"
        ) from None


def scale_weights(spans: list[Span]) -> Tensor:
    """(tokens,) 1 / l_k for every token of scale k."""
    lengths = [span.queries.stop - span.queries.start for span in spans]
    return torch.cat([torch.full((length,), 1.0 / length) for length in lengths])


class Recorder:
    """Walks the float model once and yields its units in model order.

    pipe: float pipeline; quantized: the converted transformer, whose modules are what units run.
    """

    def __init__(
        self,
        pipe: Pipeline,
        quantized: nn.Module,
        samples: CalibrationSet,
        config: CalibrationConfig,
    ) -> None:
        self.pipe, self.var, self.quantized = pipe, pipe.var, quantized
        self.config = config
        self.labels = pipe.guidance_rows(samples.labels_N)
        self.samples, self.num_rows = samples, len(self.labels)
        self.scales = pipe.scales

    @property
    def num_units(self) -> int:
        """How many units `units` yields."""
        return len(self.costs())

    def costs(self) -> dict[str, float]:
        """Names of all units in model order, with the multiply-adds of the Linears and products of
        one row: what a step costs, up to a factor."""
        tokens, width = self.scales.num_tokens, self.var.arch.width
        products = {"attn": float(tokens * tokens * width)}

        def cost(name: str, positions: int) -> float:
            weights = self.var.get_submodule(name).modules()
            numel = sum(m.weight.numel() for m in weights if isinstance(m, nn.Linear))
            return numel * positions + products.get(name.rpartition(".")[2], 0.0)

        vectors = {name: cost(name, 1) for name in self._vector_names()}
        found = {"word_embed": cost("word_embed", tokens)} if self.scales.num_scales > 1 else {}
        found |= {name: vectors[name] for name in vectors if name == SHARED_ADALN}
        for index in range(self.var.arch.depth):
            block = f"blocks.{index}"
            found |= {name: vectors[name] for name in vectors if name.startswith(f"{block}.")}
            found |= {f"{block}.{kind}": cost(f"{block}.{kind}", tokens) for kind in KINDS}
        return {**found, HEAD_ADALN: vectors[HEAD_ADALN], "head": cost("head", tokens)}

    def _vector_names(self) -> list[str]:
        """Units that see one vector per class."""
        if self.var.arch.shared_adaln:
            return [SHARED_ADALN, HEAD_ADALN]
        blocks = [f"blocks.{index}.ada_lin.1" for index in range(self.var.arch.depth)]
        return [*blocks, HEAD_ADALN]

    def units(self, wanted: Collection[str] | None = None) -> Generator[Unit]:
        """Units as they become ready, or those named in `wanted` alone; storage of a block is
        reused for the next, so use each before the next. The pass ends behind the last one."""
        names = list(self.costs())
        left = names if wanted is None else [name for name in names if name in set(wanted)]
        last = names.index(left[-1]) if left else -1
        for unit in self._walk(frozenset(left), frozenset(names[: last + 1])):
            if unit.name in left:
                yield unit

    def _walk(self, wanted: frozenset[str], reached: frozenset[str]) -> Iterator[Unit]:
        """All units up to the last of `reached`; only those of `wanted` are recorded."""
        with ExitStack() as stack:
            numel = self.num_rows * self.scales.num_tokens * self.var.arch.width
            storage = Storage.plan(numel, self.config, stack)
            yield from self._word_embed()
            if self.var.arch.shared_adaln:
                yield self._vector_unit(SHARED_ADALN)
            if not any(name.startswith(("blocks.", "head")) for name in reached):
                return
            residual = self._first_residual(storage)
            block_storage = storage.empty("block", (len(RECORDED), *residual.shape))
            records: dict[str, Tensor] = dict(zip(RECORDED, block_storage, strict=True))
            for index, block in enumerate(self.var.blocks):
                if not any(name.startswith((f"blocks.{index}.", "head")) for name in reached):
                    return
                if not self.var.arch.shared_adaln:
                    yield self._vector_unit(f"blocks.{index}.ada_lin.1")
                kinds = [kind for kind in KINDS if f"blocks.{index}.{kind}" in wanted]
                self._advance(index, cast(Block, block), residual, records, kinds)
                for kind in kinds:
                    yield self._block_unit(index, kind, records)
            yield self._vector_unit(HEAD_ADALN)
            if "head" in wanted:
                yield self._head(residual, block_storage)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, ROWS_PER_BATCH):
            yield slice(start, min(start + ROWS_PER_BATCH, self.num_rows))

    @torch.no_grad()
    def _word_embed(self) -> Iterator[Unit]:
        if self.scales.num_scales == 1:
            return
        inputs = self.pipe.vae.teacher_inputs(self.samples.ids_NL)
        yield self._unit("word_embed", inputs.float(), None, spans_of(self.scales, first=1))

    def _vector_unit(self, name: str) -> Unit:
        """An AdaLN layer: it sees one vector per class, so all classes are its calibration data."""
        inputs = F.silu(self.var.class_emb.weight.detach().float())
        return self._unit(name, inputs, None, None)

    def _unit(
        self, name: str, inputs: Tensor, targets: Tensor | None, spans: list[Span] | None
    ) -> Unit:
        module, reference = self.quantized.get_submodule(name), self.var.get_submodule(name)
        device, dtype = self.pipe.device, self.pipe.dtype

        def caller(piece: nn.Module) -> Callable[[Tensor], Tensor]:
            arguments = () if spans is None else (spans,)
            return lambda x: piece(x.to(device, dtype), *arguments)

        weights = None if spans is None else scale_weights(spans)
        return Unit(name, module, caller(module), caller(reference), inputs, targets, weights)

    @torch.no_grad()
    def _first_residual(self, storage: Storage) -> Tensor:
        shape = (self.num_rows, self.scales.num_tokens, self.var.arch.width)
        residual = storage.empty("residual", shape, torch.float32)
        for rows in self._batches():
            samples = torch.arange(rows.start, rows.stop) % len(self.samples.ids_NL)
            inputs = self.pipe.vae.teacher_inputs(self.samples.ids_NL[samples])
            residual[rows] = self.var.embed(self.var.class_emb(self.labels[rows]), inputs).float()
        return residual

    @torch.no_grad()
    def _advance(
        self,
        index: int,
        block: Block,
        residual: Tensor,
        records: dict[str, Tensor],
        kinds: Collection[str],
    ) -> None:
        """Run the float block over all rows in place, keeping inputs and outputs of its `kinds`."""
        spans = spans_of(self.scales)
        name = f"blocks.{index}"
        for rows in self._batches():
            condition = self.var.block_condition(self.var.class_emb(self.labels[rows]))
            ada = block.modulation(condition)
            with ExitStack() as taps:
                for kind in kinds:
                    taps.enter_context(_Tap(block.get_submodule(kind), records, kind, rows))
                x = residual[rows].to(self.pipe.device, self.pipe.dtype)
                residual[rows] = block(x, ada, spans).float()
            if not bool(torch.isfinite(residual[rows]).all()):
                raise NonFiniteError(f"layer {name}: float activations hold NaN or infinity")

    def _block_unit(self, index: int, kind: str, records: dict[str, Tensor]) -> Unit:
        """Attention or FFN of a block: both are called with their tokens and spans."""
        inputs, targets = records[f"{kind}.inputs"], records[f"{kind}.targets"]
        return self._unit(f"blocks.{index}.{kind}", inputs, targets, spans_of(self.scales))

    @torch.no_grad()
    def _head(self, residual: Tensor, block_storage: Tensor) -> Unit:
        """The head's inputs take the place of the residual stream, its outputs that of the block
        units' records if they fit, as they do up to four entries a channel."""
        spans, shape = spans_of(self.scales), (*residual.shape[:2], self.var.arch.codebook_size)
        numel = math.prod(shape)
        fits = numel <= block_storage.numel()
        targets = block_storage.flatten()[:numel].view(shape) if fits else None
        for rows in self._batches():
            ada = self.var.head_nm.modulation(self.var.class_emb(self.labels[rows]))
            x = residual[rows].to(self.pipe.device, self.pipe.dtype)
            normed = self.var.head_nm(x, ada)
            residual[rows] = normed.float()
            if targets is not None:
                targets[rows] = self.var.head(normed, spans).to("cpu", targets.dtype)
        return self._unit("head", residual, targets, spans)


class _Tap:
    """Forward hook that writes a module's input and output into the record's rows."""

    def __init__(
        self, module: nn.Module, records: dict[str, Tensor], kind: str, rows: slice
    ) -> None:
        self.module, self.records, self.kind, self.rows = module, records, kind, rows

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_hook(self._store)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _store(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.records[f"{self.kind}.inputs"][self.rows] = inputs[0].to(
            "cpu", self.records[f"{self.kind}.inputs"].dtype
        )
        self.records[f"{self.kind}.targets"][self.rows] = output.to(
            "cpu", self.records[f"{self.kind}.targets"].dtype
        )
