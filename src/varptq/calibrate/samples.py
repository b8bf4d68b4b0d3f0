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
from varptq.calibrate.resample import ResampleReport, resample_tokens
from varptq.models.generate import DEFAULT_BATCH, ScaleEvent, generate
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts, dealt
from varptq.progress import Progress, silent
from varptq.work import Piece, Work

STAGE, PIECE = "calibration samples", "samples"


@dataclass(frozen=True)
class CalibrationSet:
    """N prompts and their tokens (N, L) or (N, L, draws) int64; `resampling` tells what was moved,
    if anything was, and `summary` is that as plain values: all that is kept on a disk."""

    prompts: Prompts
    tokens: Tensor
    resampling: ResampleReport | None = None
    summary: dict[str, Any] | None = None

    def batches(self, size: int) -> Iterator[tuple[Prompts, Tensor]]:
        """Prompts and tokens of `size` images at a time."""
        return zip(self.prompts.split(size), self.tokens.split(size), strict=True)

    def first(self, count: int) -> CalibrationSet:
        """The first images, without what resampling moved."""
        return self.part(slice(0, count))

    def part(self, rows: slice | Tensor) -> CalibrationSet:
        """Some of the images, without what resampling moved."""
        return CalibrationSet(self.prompts[rows], self.tokens[rows])


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
    pool = pipe.pool()
    prompts = pool[dealt(len(pool), config.num_samples, seed)]
    report: ResampleReport | None = None

    def join() -> Piece:
        nonlocal report
        ids_NL, report = _joined(pipe, work, list(starts), seed, resampled)
        facts = {"resampling": report.to_dict() if report else None}
        return Piece({"ids": ids_NL}, facts)

    starts = {f"batch-{first:06}": first for first in range(0, len(prompts), DEFAULT_BATCH)}
    if work.missing([PIECE]):
        mine = work.ranks.share(work.missing(list(starts)))
        progress(STAGE, 0, len(prompts))
        for name in mine:
            rows = slice(starts[name], min(starts[name] + DEFAULT_BATCH, len(prompts)))
            work.write(name, _batch(pipe, prompts, rows, config, seed, resampled))
            progress(STAGE, rows.stop, len(prompts))
        work.ranks.barrier()
    found = work.once(PIECE, join)
    work.drop(starts)
    tokens = found.tensors["ids"].to(pipe.device)
    return CalibrationSet(prompts, tokens, report, found.facts["resampling"])


def _batch(
    pipe: Pipeline,
    prompts: Prompts,
    rows: slice,
    config: CalibrationConfig,
    seed: int,
    resampled: bool,
) -> Piece:
    """Tokens of images `rows`, with their filtered probabilities if they are to be resampled."""
    probabilities = FilteredProbabilities(pipe.alphabet.size, config.sampling.temperature)
    output = generate(
        pipe,
        prompts[rows],
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
    """All tokens on the CPU, and what resampling did; one scale of probabilities at a time is in
    memory. The draws of a token are resampled one by one."""
    tokens = torch.cat([work.read(name, ["ids"]).tensors["ids"].cpu() for name in batches])
    if not resampled:
        return tokens, None
    alphabet = pipe.alphabet

    def dense(scale: int) -> Tensor:
        keys = (f"values.{scale}", f"indices.{scale}")
        stored = (work.read(name, keys).tensors for name in batches)
        return FilteredProbabilities.unpack(alphabet.size, scale, stored).dense(scale)

    lengths = [alphabet.draws * length for length in pipe.scales.lengths]
    symbols, report = resample_tokens(
        alphabet.symbols(tokens), dense, lengths, seed, alphabet.draws
    )
    return alphabet.tokens(symbols), report
