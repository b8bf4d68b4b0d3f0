"""The calibration set: images that the float model generates itself, optionally resampled.

Resampling makes codebook frequencies match predicted probabilities (paper: resampling of
calibration data; docs/method.md section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.resample import ResampleReport, resample
from varptq.models.generate import DEFAULT_BATCH, ScaleEvent, generate
from varptq.models.pipeline import Pipeline
from varptq.progress import Progress, silent
from varptq.work import Piece, Work

STAGE, PIECE = "calibration samples", "samples"


@dataclass(frozen=True)
class CalibrationSet:
    """labels_N (N,) int64 and tokens ids_NL (N, L) int64. `resampling` reports which tokens were
    moved, if any; `summary` is the same as plain values, which is all that is kept on disk."""

    labels_N: Tensor
    ids_NL: Tensor
    resampling: ResampleReport | None = None
    summary: dict[str, Any] | None = None

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels and tokens of `size` images at a time."""
        return zip(self.labels_N.split(size), self.ids_NL.split(size), strict=True)

    def first(self, count: int) -> CalibrationSet:
        """The first images, without the report of resampling."""
        return CalibrationSet(self.labels_N[:count], self.ids_NL[:count])


@dataclass
class FilteredProbabilities:
    """Filtered next-token probabilities, stored as their largest entries per position.

    A filter keeps few of the V entries, so only their values (float32) and indices (int32) are
    stored, padded per batch.
    """

    vocabulary: int
    temperature: float = 1.0
    parts: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def add(self, event: ScaleEvent) -> None:
        probs_BlV = (event.logits_BlV / self.temperature).softmax(dim=-1)
        kept = int((probs_BlV > 0).sum(dim=-1).max())
        values, indices = probs_BlV.topk(kept, dim=-1)
        self.parts.setdefault(event.scale, []).append(
            (values.cpu(), indices.to("cpu", torch.int32))
        )

    def dense(self, scale: int) -> Tensor:
        """(N, l, V) float32 probabilities of one scale."""
        rows = [self._scatter(values, indices) for values, indices in self.parts[scale]]
        return torch.cat(rows)

    def pack(self) -> dict[str, Tensor]:
        """Plain tensors by name, of one batch."""
        packed: dict[str, Tensor] = {}
        for scale, parts in self.parts.items():
            ((packed[f"values.{scale}"], packed[f"indices.{scale}"]),) = parts
        return packed

    @classmethod
    def unpack(cls, vocabulary: int, scale: int, batches: Iterable[dict[str, Tensor]]) -> Self:
        """One scale of packed batches."""
        parts = [(batch[f"values.{scale}"], batch[f"indices.{scale}"]) for batch in batches]
        return cls(vocabulary, parts={scale: parts})

    def _scatter(self, values_Blk: Tensor, indices_Blk: Tensor) -> Tensor:
        dense = values_Blk.new_zeros(*values_Blk.shape[:2], self.vocabulary)
        return dense.scatter_(-1, indices_Blk.long(), values_Blk)


def choose_labels(num_classes: int, count: int, seed: int) -> Tensor:
    """(count,) int64 distinct classes in random order, repeated if there are fewer classes than
    samples."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // num_classes)
    order = [
        torch.randperm(num_classes, generator=generator, dtype=torch.int64, device="cpu")
        for _ in range(rounds)
    ]
    return torch.cat(order)[:count]


def calibration_set(
    pipe: Pipeline,
    config: CalibrationConfig,
    *,
    seed: int,
    resampled: bool,
    progress: Progress = silent,
    work: Work | None = None,
) -> CalibrationSet:
    """Generate the tokens of `config.num_samples` images with the float model; resample them if
    asked.

    The batches are always the same; each is a piece of `work`, assigned to one of its processes. A
    set read from `work` has only the summary of its resampling.
    """
    work = work or Work()
    labels_N = choose_labels(pipe.num_classes, config.num_samples, seed)
    report: ResampleReport | None = None

    def join() -> Piece:
        nonlocal report
        ids_NL, report = _joined(pipe, work, list(starts), seed, resampled)
        facts = {"resampling": report.to_dict() if report else None}
        return Piece({"ids": ids_NL}, facts)

    starts = {f"batch-{first:06}": first for first in range(0, len(labels_N), DEFAULT_BATCH)}
    if work.missing([PIECE]):
        mine = work.ranks.share(work.missing(list(starts)))
        progress(STAGE, 0, len(labels_N))
        for name in mine:
            rows = slice(starts[name], min(starts[name] + DEFAULT_BATCH, len(labels_N)))
            work.write(name, _batch(pipe, labels_N, rows, config, seed, resampled))
            progress(STAGE, rows.stop, len(labels_N))
        work.ranks.barrier()
    found = work.once(PIECE, join)
    work.drop(starts)
    ids_NL = found.tensors["ids"].to(pipe.device)
    return CalibrationSet(labels_N, ids_NL, report, found.facts["resampling"])


def _batch(
    pipe: Pipeline,
    labels_N: Tensor,
    rows: slice,
    config: CalibrationConfig,
    seed: int,
    resampled: bool,
) -> Piece:
    """Tokens of images `rows`, with their filtered probabilities if they are to be resampled."""
    probabilities = FilteredProbabilities(pipe.var.arch.codebook_size, config.sampling.temperature)
    output = generate(
        pipe,
        labels_N[rows],
        seed=seed,
        **config.sampling.to_dict(),
        first_index=rows.start,
        decode=False,
        on_scale=probabilities.add if resampled else None,
    )
    return Piece({"ids": output.tokens, **probabilities.pack()})


def _joined(
    pipe: Pipeline, work: Work, batches: list[str], seed: int, resampled: bool
) -> tuple[Tensor, ResampleReport | None]:
    """All tokens (N, L) on the CPU, and the report of resampling; one scale of probabilities is in
    memory at a time."""
    ids_NL = torch.cat([work.read(name, ["ids"]).tensors["ids"].cpu() for name in batches])
    if not resampled:
        return ids_NL, None

    def dense(scale: int) -> Tensor:
        keys = (f"values.{scale}", f"indices.{scale}")
        stored = (work.read(name, keys).tensors for name in batches)
        return FilteredProbabilities.unpack(pipe.var.arch.codebook_size, scale, stored).dense(scale)

    return resample(ids_NL, dense, pipe.scales, seed)
