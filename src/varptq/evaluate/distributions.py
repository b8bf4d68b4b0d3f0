"""Sets of images compared through a feature network: one pass over each set, then the numbers.

    FID, sFID, FID2FP   frechet_distance of Gaussians        IS   scores.InceptionScore
    precision, recall   prdc.precision_recall on all pooled features
Gaussians and the score stream; pooled features are kept only where precision or recall asks for
them (4 D bytes an image). The formulas are in the files named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varptq.evaluate.features import FeatureNetwork, Features, part_of
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.prdc import precision_recall
from varptq.evaluate.sampling import SampleSet
from varptq.evaluate.scores import InceptionScore
from varptq.pictures import Pixels
from varptq.progress import Progress

NEIGHBOURS = 3
# Metrics of one set of samples, and the ones that need all features of two sets.
AGAINST_REAL = ("fid", "sfid", "precision", "recall")
KEEP_ALL = {"precision", "recall"}


@dataclass
class FeatureSums:
    """What is kept of a set of images for the metrics in `wanted`."""

    network: str
    wanted: Collection[str]
    pooled: Gaussian = field(default_factory=Gaussian)
    spatial: Gaussian = field(default_factory=Gaussian)
    score: InceptionScore = field(default_factory=InceptionScore)
    kept: list[Tensor] = field(default_factory=list)

    def update(self, features: Features) -> None:
        self.pooled.update(features.pooled)
        if "sfid" in self.wanted:
            self.spatial.update(part_of(features, "spatial", self.network))
        if "is" in self.wanted:
            self.score.update(part_of(features, "probabilities", self.network))
        if KEEP_ALL & set(self.wanted):
            self.kept.append(features.pooled.cpu())


def collect(
    network: FeatureNetwork,
    images: SampleSet | ImageFiles,
    wanted: Collection[str],
    batch: int,
    stage: str,
    progress: Progress,
) -> FeatureSums:
    """One pass of all `images` through the network, `batch` at a time."""
    sums, done = FeatureSums(network.name, wanted), 0
    progress(stage, 0, images.count)
    for pixels in _batches(images, batch):
        # A copy: torch warns of arrays that are read only, as those from a file are.
        sums.update(network(torch.from_numpy(pixels.copy())))
        done += len(pixels)
        progress(stage, done, images.count)
    return sums


def _batches(images: SampleSet | ImageFiles, batch: int) -> Iterator[Pixels]:
    if isinstance(images, ImageFiles):
        yield from images.batches(batch)
        return
    for shard in images.shards():
        for start in range(0, len(shard.images), batch):
            yield shard.images[start : start + batch]


def measure(
    samples: FeatureSums, reference: FeatureSums | None, wanted: Collection[str]
) -> dict[str, float]:
    """The metrics of one set of samples; `reference` are the sums of the real images."""
    found: dict[str, float] = {}
    if "is" in wanted:
        scores = torch.tensor(samples.score.scores, dtype=torch.float64)
        found["is"] = samples.score.score
        if len(scores) > 1:
            found["is_std"] = float(scores.std(correction=0))
    if reference is None:
        return found
    if "fid" in wanted:
        found["fid"] = frechet_distance(samples.pooled, reference.pooled)
    if "sfid" in wanted:
        found["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if KEEP_ALL & set(wanted):
        pair = precision_recall(torch.cat(reference.kept), torch.cat(samples.kept), NEIGHBOURS)
        both = dict(zip(("precision", "recall"), pair, strict=True))
        found |= {name: value for name, value in both.items() if name in wanted}
    return found
