"""The calibration set: images the float model generates itself, optionally resampled.

Resampling makes codebook frequencies match predicted probabilities (paper: resampling of
calibration data; docs/method.md section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.resample import ResampleReport, resample
from varptq.models.generate import ScaleEvent, generate
from varptq.models.pipeline import Pipeline
from varptq.progress import Progress, silent


@dataclass(frozen=True)
class CalibrationSet:
    """labels_N (N,) int64 and tokens ids_NL (N, L) int64; `resampling` tells what was moved, if
    anything was."""

    labels_N: Tensor
    ids_NL: Tensor
    resampling: ResampleReport | None = None


@dataclass
class FilteredProbabilities:
    """Filtered next-token probabilities, stored as their largest entries per position.

    A filter leaves few of V entries, so values (float32) and indices (int32) of those are kept,
    padded per batch.
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

    def _scatter(self, values_Blk: Tensor, indices_Blk: Tensor) -> Tensor:
        dense = values_Blk.new_zeros(*values_Blk.shape[:2], self.vocabulary)
        return dense.scatter_(-1, indices_Blk.long(), values_Blk)


def choose_labels(num_classes: int, count: int, seed: int) -> Tensor:
    """(count,) int64 distinct classes in random order; fewer classes than samples are cycled
    through."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count // num_classes)
    order = [torch.randperm(num_classes, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[:count]


def _renamed(progress: Progress, stage_name: str) -> Progress:
    def report(stage: str, done: int, total: int, info: str = "") -> None:
        progress(stage_name, done, total, info)

    return report


def calibration_set(
    pipe: Pipeline,
    config: CalibrationConfig,
    *,
    seed: int,
    resampled: bool,
    progress: Progress = silent,
) -> CalibrationSet:
    """Generate `config.num_samples` images' tokens with the float model; resample them if asked."""
    labels_N = choose_labels(pipe.num_classes, config.num_samples, seed)
    probabilities = FilteredProbabilities(pipe.var.arch.codebook_size, config.sampling.temperature)
    output = generate(
        pipe,
        labels_N,
        seed=seed,
        **config.sampling.to_dict(),
        decode=False,
        on_scale=probabilities.add if resampled else None,
        progress=_renamed(progress, "calibration samples"),
    )
    if not resampled:
        return CalibrationSet(labels_N, output.tokens)
    ids_NL, report = resample(output.tokens.cpu(), probabilities.dense, pipe.scales, seed)
    return CalibrationSet(labels_N, ids_NL.to(pipe.device), report)
