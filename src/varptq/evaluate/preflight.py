"""Before anything is sampled: which metrics can be had, and whether the sets can be compared.

Sampling takes hours and a mistake seconds to find, so all that can be refused is refused here. What
metrics need is in catalogue.py, their computation in metrics.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from varptq.errors import InputError
from varptq.evaluate.catalogue import choose
from varptq.evaluate.clip import ClipEncoder
from varptq.evaluate.distributions import AGAINST_REAL, NEIGHBOURS
from varptq.evaluate.features import FeatureNetwork
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.lpips import MIN_SIDE, Lpips
from varptq.evaluate.paired import SSIM_WINDOW
from varptq.models.pipeline import Pipeline


@dataclass(frozen=True)
class Instruments:
    """What some metrics need beside the samples; None is not there."""

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
    """The metrics that `evaluate` computes of `count` images, and for the others what is missing.

    metrics: names of `catalogue.METRICS`; None is everything that can be had. Raises `InputError`
    for a metric asked for that cannot be had, and for real images of another size than the
    samples: resizing either changes every distance.
    """
    chosen, left_out = choose(metrics, _have(pipe, float_pipe, instruments, count))
    reference, side = instruments.reference, pipe.vae.image_size
    if reference and reference.size != (side, side) and set(AGAINST_REAL) & set(chosen):
        height, width = reference.size
        raise InputError(
            f"images {reference.path}: {height} x {width}, expected {side} x {side} like the "
            f"samples of {pipe.name!r}; resize them first"
        )
    return chosen, left_out


def _have(pipe: Pipeline, float_pipe: Pipeline | None, tools: Instruments, count: int) -> set[str]:
    """Keys of `catalogue.NEEDS` that are there."""
    side = pipe.vae.image_size
    fewest = min(count, tools.reference.count) if tools.reference else count
    have = {
        "pair": float_pipe is not None,
        "reference": tools.reference is not None,
        "lpips": tools.lpips is not None,
        "clip": tools.clip is not None and bool(pipe.class_names),
        "side11": side >= SSIM_WINDOW,
        "side31": side >= MIN_SIDE,
        "network": tools.network is not None,
        "two": fewest >= 2,
        "four": fewest > NEIGHBOURS,
    }
    if tools.network is not None:
        # What a network gives is known once it has seen an image.
        features = tools.network(torch.zeros(1, side, side, 3, dtype=torch.uint8, device="cpu"))
        have["spatial"] = features.spatial is not None
        have["probabilities"] = features.probabilities is not None
    return {name for name, there in have.items() if there}
