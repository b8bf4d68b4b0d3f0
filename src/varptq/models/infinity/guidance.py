"""Guidance of Infinity within the pass: mixtures of hidden states (Han et al., CVPR 2025).

    x = (1 + t) x_asked - t x_nothing,   t = cfg - 1

Place -m mixes both rows of the residual stream after block depth - m, so that -1 is after the last;
place 0 is the logits, which whoever runs the pass mixes. Without it the rows that are asked for
give the logits alone. Rows are [asked; nothing], as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varptq.errors import ConfigError
from varptq.models.sampling import LOGITS, guided
from varptq.models.seams import Span, Stage

BLOCK = "blocks."


def check_places(places: Sequence[int], depth: int) -> None:
    """Raise `ConfigError` for no place, and for one that is not among so many blocks."""
    if not places:
        raise ConfigError(f"guide_at: empty, expected places such as {LOGITS}, the logits")
    for place in places:
        if not -depth < place <= LOGITS:
            raise ConfigError(
                f"guide_at {place}: expected {LOGITS} (logits) or {1 - depth}..-1 (after a block)"
            )


def with_mixtures(
    stages: Sequence[Stage], strengths: Sequence[float], places: Sequence[int]
) -> list[Stage]:
    """The pass with the mixtures that `places` ask for between its blocks, at the strength t of
    every scale. Raises `ConfigError` as `check_places`."""
    depth = sum(stage.name.startswith(BLOCK) for stage in stages)
    check_places(places, depth)
    mixed = {f"{BLOCK}{depth + place}" for place in places if place != LOGITS}
    return [_mixing(stage, strengths) if stage.name in mixed else stage for stage in stages]


def _mixing(stage: Stage, strengths: Sequence[float]) -> Stage:
    def run(x_2BlC: Tensor, spans: list[Span], cache: Any) -> Tensor:
        parts = stage.run(x_2BlC, spans, cache).split([span.length for span in spans], dim=1)
        mixed = [
            guided(part, strengths[span.scale]) for part, span in zip(parts, spans, strict=True)
        ]
        return torch.cat(mixed, dim=1).repeat(2, 1, 1)

    return stage._replace(run=run)
