"""Checks before anything is sampled: which metrics are possible, and whether the sets match.

Sampling takes hours and the checks take seconds, so whatever can be refused is refused here. What
metrics need is in catalogue.py, their computation in evaluate.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from varptq.errors import InputError
from varptq.evaluate.catalogue import METRICS, choose
from varptq.evaluate.distributions import NEIGHBOURS
from varptq.evaluate.features import FeatureNetwork
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.networks.clip import ClipEncoder
from varptq.evaluate.networks.lpips import MIN_SIDE, Lpips
from varptq.evaluate.paired import SSIM_WINDOW
from varptq.evaluate.references import (
    AGAINST_REAL,
    Widths,
    check_statistics,
    of_statistics,
)
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Size


@dataclass(frozen=True)
class Instruments:
    """What some metrics need beside the samples; None if missing."""

    network: FeatureNetwork | None = None
    reference: ImageFiles | None = None
    lpips: Lpips | None = None
    clip: ClipEncoder | None = None


def plan(
    pipe: Pipeline,
    float_pipe: Pipeline | None,
    instruments: Instruments,
    metrics: Collection[str] | None,
    count: int,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The metrics that `evaluate` computes from `count` images, and for the others what is missing.

    metrics: names of `catalogue.METRICS`; None means all that are possible. Raises `InputError`
    if a metric in `metrics` is not possible, for statistics that are invalid or of another network,
    and for real images of another size than the samples: resizing either changes every distance.
    """
    reference, drawn = instruments.reference, pipe.vae.image_size
    widths = _widths(instruments.network, drawn)
    if reference and instruments.network:
        asked = METRICS if metrics is None else metrics
        check_statistics(reference, instruments.network.name, asked, widths)
    chosen, left_out = choose(metrics, _have(pipe, float_pipe, instruments, count, widths))
    size = reference.size if reference else None
    if reference and size and size != drawn and set(AGAINST_REAL) & set(chosen):
        (height, width), (rows, columns) = size, drawn
        raise InputError(
            f"images {reference.path}: {height} x {width}, expected {rows} x {columns} like the "
            f"samples of {pipe.name!r}; resize them first"
        )
    return chosen, left_out


def _widths(network: FeatureNetwork | None, size: Size) -> Widths:
    """How many features of each part the network gives, found by running it on one image."""
    if network is None:
        return {}
    features = network(torch.zeros(1, *size, 3, dtype=torch.uint8, device="cpu"))
    parts = features._asdict().items()
    return {part: values.shape[1] for part, values in parts if values is not None}


def _have(
    pipe: Pipeline, float_pipe: Pipeline | None, tools: Instruments, count: int, widths: Widths
) -> set[str]:
    """Keys of `catalogue.NEEDS` that are available."""
    side, reference = min(pipe.vae.image_size), tools.reference
    real = reference.count if reference else 0
    published = of_statistics(reference, METRICS, widths)
    fewest = min(count, real) if real and "fid" not in published else count
    have = {
        "pair": float_pipe is not None,
        "reference": real > 0,
        "moments": real > 0 or "fid" in published,
        "spatial moments": real > 0 or "sfid" in published,
        "lpips": tools.lpips is not None,
        "clip": tools.clip is not None and len(pipe.pool().captions()) == len(pipe.pool()),
        "side11": side >= SSIM_WINDOW,
        "side31": side >= MIN_SIDE,
        "network": tools.network is not None,
        "two": fewest >= 2,
        "four": min(count, real) > NEIGHBOURS,
        "spatial": "spatial" in widths,
        "probabilities": "probabilities" in widths,
    }
    return {name for name, there in have.items() if there}
