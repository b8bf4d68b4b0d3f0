"""Sets of images compared through a feature network: one pass over each set, then the metrics.

    FID, sFID, FID2FP   frechet_distance of Gaussians        IS   scores.InceptionScore
    precision, recall   prdc.precision_recall on all pooled features
Gaussians and the score are accumulated in a stream; pooled features are kept only if precision or
recall needs them (4 D bytes per image). A set is cut into the same parts for any number of
processes, which share them, and the sums are added in order. The formulas are in the files named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

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
from varptq.work import Piece, Work, pack, unpack

NEIGHBOURS = 3
# Metrics that need all features of two sets.
KEEP_ALL = {"precision", "recall"}
# Parts of a set: at most as many processes share it; a part of 2048 features takes 32 MiB.
MOST_PARTS = 64


@dataclass
class FeatureSums:
    """Sums over a set of images for the metrics in `wanted`."""

    network: str
    wanted: Collection[str]
    pooled: Gaussian = field(default_factory=Gaussian)
    spatial: Gaussian = field(default_factory=Gaussian)
    score: InceptionScore = field(default_factory=InceptionScore)
    kept: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def update(self, features: Features) -> None:
        self.pooled.update(features.pooled)
        if "sfid" in self.wanted:
            self.spatial.update(part_of(features, "spatial", self.network))
        if "is" in self.wanted:
            # Splits of the score are runs of consecutive images, however the parts are cut: add
            # rows in order.
            self.probabilities.append(part_of(features, "probabilities", self.network).cpu())
        if KEEP_ALL & set(self.wanted):
            self.kept.append(features.pooled.cpu())

    def replace(self, moments: Mapping[str, Gaussian]) -> None:
        """Replace the parts in `moments` by published statistics."""
        self.pooled = moments.get("pooled", self.pooled)
        self.spatial = moments.get("spatial", self.spatial)

    def pack(self) -> Piece:
        """All sums over a part of the images, as tensors."""
        lists = {"kept": self.kept, "probabilities": self.probabilities}
        parts = {
            "pooled": Piece(self.pooled.state()),
            "rows": Piece({name: torch.cat(rows) for name, rows in lists.items() if rows}),
        }
        if "sfid" in self.wanted:
            parts["spatial"] = Piece(self.spatial.state())
        return pack(parts)

    def merge(self, piece: Piece) -> None:
        """Add the next part of the images."""
        parts = unpack(piece)
        self.pooled.merge(Gaussian.from_state(parts["pooled"].tensors))
        if "spatial" in parts:
            self.spatial.merge(Gaussian.from_state(parts["spatial"].tensors))
        rows = parts["rows"].tensors
        if "kept" in rows:
            self.kept.append(rows["kept"])
        if "probabilities" in rows:
            self.score.update(rows["probabilities"])


def collect(
    network: FeatureNetwork,
    images: SampleSet | ImageFiles,
    wanted: Collection[str],
    batch: int,
    stage: str,
    progress: Progress,
    work: Work,
) -> FeatureSums:
    """One pass of all `images` through the network, `batch` at a time."""
    whole = FeatureSums(network.name, wanted)
    shards = isinstance(images, SampleSet)
    parts = cut(images.num_shards if shards else -(-images.count // batch))
    images_each = images.shard_size if shards else batch
    progress(stage, 0, images.count)

    def make(index: int) -> Piece:
        sums, done = FeatureSums(network.name, wanted), parts[index].start * images_each
        for pixels in _batches(images, batch, parts[index]):
            # A copy: torch warns of arrays that are read only, as those from a file are.
            sums.update(network(torch.from_numpy(pixels.copy())))
            done += len(pixels)
            progress(stage, done, images.count)
        return sums.pack()

    prefix = stage.replace(" ", "-")
    for piece in work.each([f"{prefix}-{index}" for index in range(len(parts))], make):
        whole.merge(piece)
    return whole


def cut(count: int, most: int = MOST_PARTS) -> list[range]:
    """0 .. count - 1 cut into at most `most` runs of nearly equal length, the same for any number
    of processes."""
    parts = min(count, most)
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _batches(images: SampleSet | ImageFiles, batch: int, part: range) -> Iterator[Pixels]:
    """The batches of a part: of these shards, or these batches of a file."""
    if isinstance(images, ImageFiles):
        yield from islice(images.batches(batch), part.start, part.stop)
        return
    for shard in images.shards(part):
        for start in range(0, len(shard.images), batch):
            yield shard.images[start : start + batch]


def measure(
    samples: FeatureSums, reference: FeatureSums | None, wanted: Collection[str]
) -> dict[str, float]:
    """The metrics of one set of samples; `reference` are the sums of the real images."""
    found: dict[str, float] = {}
    if "is" in wanted:
        scores = torch.tensor(samples.score.scores, dtype=torch.float64, device="cpu")
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
