"""The methods table: what each way to quantize does to tokens, to images and to their distribution.

    python -m benchmarks.quality.methods [--count N] [--seeds 0 1 2] [--widths ...] [--methods ...]
    python -m benchmarks.quality.methods --network inception:FILE --float-images 1000   # once more
    python -m benchmarks.quality.methods --compile ...  # the same images, sampled a third faster
    python -m benchmarks.quality.methods --model demo-text ...
    python -m benchmarks.quality.methods --widths bops1 ... --methods preset  # as users have it

Per row (width, method, calibration seed): calibrate as proof.py does, keep the artifact, sample
`count` images, and measure
    kl, top1    against the float model on proof.py's held-out tokens
    lpips       mean over pairs of images of one seed, float and quantized
    fd, fd2fp   Frechet distance in features of the network, to real images and to float samples
    fd_vqvae    the same to real images that went through the VQVAE, whose blur all samples share
    accuracy    share of images that the classifier calls their class (of a text: the one that its
                noun names);  is   its Inception Score
and the distances once more without each tenth of the images in turn ("without"): their scatter is
the standard error that comes from the number of images (jackknife). Tenths are of the same images
in every row, so that errors of differences between rows can be taken too.
Rows "float" are the float model with other image seeds: what chance alone moves. Row "vqvae" are
the real images through the VQVAE: the least distance any tokens could reach.
Appends one line per row to results/methods.jsonl (methods_text.jsonl for the text demo) and skips
what is there. Images lie in shards of
64 and artifacts in --out, so a run can be killed and goes on, and a larger --count extends the
sets. VARPTQ_WEIGHTS names the folder of measuring networks and images (docs/metrics.md).
`methods_report.py` makes tables and pictures.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import varptq
from benchmarks.common.caption_classes import classes_named
from benchmarks.common.compiled import compile_quantizers
from benchmarks.common.held_out import CALIBRATION, held_out
from benchmarks.common.judges import CLASSIFIER, FEATURE_BATCH, LPIPS, REFERENCE, RESNET56
from benchmarks.common.methods_rows import (
    ABLATION,
    FLOAT,
    NEAREST,
    PRESET,
    PRESET_IMAGES,
    STUDIES,
    VQVAE,
    Study,
    calibration_method,
    preset_of,
)
from benchmarks.common.results import append_line, read_lines
from varptq.evaluate.features import load_network, part_of
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.sampling import SampleSet, sample_set
from varptq.evaluate.scores import InceptionScore
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.pictures import to_pixels

FLOAT_SEEDS = (1, 2, 3)
# Neighbours of ten differ in class, so tenths are made of tens.
GROUPS, TEN = 10, 10
# Above this many features a distance is too dear to be taken eleven times.
JACKKNIFE_DIM = 256


class Row(NamedTuple):
    """A line of the table; seed: of the calibration, or of the images where there is none."""

    width: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.width}-{self.method}-{self.seed}"

    @property
    def preset(self) -> str:
        return preset_of(self.width, self.method)

    @property
    def calibration_method(self) -> str:
        return calibration_method(self.method)


def rows(
    study: Study, widths: Iterable[str], methods: Iterable[str], seeds: Iterable[int]
) -> Iterator[Row]:
    """Anchors first, then seed by seed, so that an early stop leaves a whole table."""
    yield Row(VQVAE, VQVAE, 0)
    yield from (Row(FLOAT, FLOAT, seed) for seed in FLOAT_SEEDS)
    for seed in seeds:
        for width in widths:
            for method in methods:
                if study.has(width, method) and not (method == NEAREST and seed):
                    yield Row(width, method, seed)


class Bench:
    """The float model with its samples, the networks, and everything measured once."""

    def __init__(
        self, model: str, out: Path, weights: Path, network: str, count: int, float_images: int
    ):
        self.out, self.count = out / model, count
        self.pipe = varptq.load_model(model)
        self.network = load_network(network)
        self.lpips = Lpips.load(weights / LPIPS)
        self.test = held_out(self.pipe)
        self.reference = ImageFiles.open(weights / REFERENCE)
        self.float_samples = self.sample(self.pipe, "float-0", max(count, float_images), 0)
        self.real = self.gaussian(self.reference.batches(FEATURE_BATCH))
        self.rebuilt = self.gaussian(self.reconstructions())
        self.float_set = SampleSet(
            self.float_samples.folder, float_images, self.float_samples.identity
        )
        self.of_float = self.gaussian(shard.images for shard in self.float_set.shards())

    def sample(self, pipe: Pipeline, name: str, count: int, seed: int) -> SampleSet:
        return sample_set(pipe, self.out / name / "samples", count=count, seed=seed)

    def classes(self, labels: np.ndarray) -> np.ndarray:
        """What images with these places in the pool should show."""
        if not self.pipe.encoder:
            return labels
        return classes_named(self.pipe.pool().titles())[labels]

    def gaussian(self, batches: Iterable[np.ndarray]) -> Gaussian:
        found = Gaussian()
        for batch in batches:
            found.update(self.network(torch.from_numpy(batch.copy())).pooled)
        return found

    def quantized(self, row: Row) -> tuple[Pipeline, float]:
        """The artifact of a row, calibrated if it is not there, and the seconds that took."""
        folder, seconds = self.out / row.name / "model", 0.0
        if not folder.exists():
            started = time.monotonic()
            made = varptq.quantize(
                self.pipe,
                varptq.QuantConfig.preset(row.preset),
                method=row.calibration_method,
                calibration=CALIBRATION,
                seed=row.seed,
            )
            seconds = time.monotonic() - started
            varptq.save(made, folder)
        return varptq.load(folder, runtime="cpu" if row.method == PRESET else "simulated"), seconds

    def tokens(self, pipe: Pipeline) -> dict[str, Any]:
        return token_fidelity(self.pipe, pipe, self.test.prompts, self.test.tokens).to_dict()

    def distances(self, found: Gaussian) -> dict[str, float]:
        return {
            "fd": frechet_distance(found, self.real),
            "fd_vqvae": frechet_distance(found, self.rebuilt),
            "fd2fp": frechet_distance(found, self.of_float),
        }

    def images(self, samples: SampleSet) -> dict[str, Any]:
        """Everything about a set of samples, in one pass over it."""
        groups, score, hits, apart = [Gaussian() for _ in range(GROUPS)], InceptionScore(), 0, 0.0
        whole = self.network.name == RESNET56
        for ours, theirs in zip(samples.shards(), self.float_samples.shards(), strict=False):
            pixels = torch.from_numpy(ours.images.copy())
            features = [self.network(part) for part in pixels.split(FEATURE_BATCH)]
            divide(groups, torch.cat([part.pooled for part in features]), ours.first)
            if whole:
                probabilities = torch.cat([part_of(x, "probabilities", RESNET56) for x in features])
                score.update(probabilities)
                called = probabilities.argmax(-1).cpu().numpy()
                hits += int((called == self.classes(ours.labels)).sum())
                pair = torch.from_numpy(theirs.images[: len(pixels)].copy())
                apart += float(self.lpips(pixels, pair).double().sum())
        result: dict[str, Any] = self.distances(merged(groups))
        if groups[0].dim <= JACKKNIFE_DIM:
            result["without"] = self.without(groups)
        if whole:
            share = {"accuracy": hits / len(samples), "lpips": apart / len(samples)}
            result |= share | {"is": score.score}
        return result

    def without(self, groups: list[Gaussian]) -> dict[str, list[float]]:
        """Each distance without one group after the other."""
        found = [self.distances(merged(groups[:i] + groups[i + 1 :])) for i in range(GROUPS)]
        return {name: [one[name] for one in found] for name in found[0]}

    def measure(self, row: Row) -> dict[str, Any]:
        """The line of one row, without its settings."""
        if row.width == VQVAE:
            return {"images": self.distances(self.rebuilt)}
        if row.width == FLOAT:
            samples = self.sample(self.pipe, f"float-{row.seed}", self.count, row.seed)
            return {"images": self.images(samples)}
        pipe, seconds = self.quantized(row)
        line: dict[str, Any] = {"theta": pipe.theta, "calibration_seconds": round(seconds, 1)}
        if self.network.name == RESNET56:
            line["fidelity"] = self.tokens(pipe)
        samples = self.sample(pipe, row.name, self.count, 0)
        return line | {"images": self.images(samples)}

    @torch.no_grad()
    def reconstructions(self) -> Iterator[np.ndarray]:
        """The real images as the VQVAE gives them back, as uint8."""
        for batch in self.reference.batches(FEATURE_BATCH):
            x = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
            decoded = self.pipe.vae.decode(self.pipe.vae.encode(x))
            yield to_pixels(decoded.float().add(1).mul(0.5))


def divide(groups: list[Gaussian], features_BD: torch.Tensor, first: int) -> None:
    """Add the features of images first, first + 1, ... to their tenths."""
    group_B = (torch.arange(first, first + len(features_BD)) // TEN) % len(groups)
    for index, group in enumerate(groups):
        if (group_B == index).any():
            group.update(features_BD[group_B == index])


def merged(groups: list[Gaussian]) -> Gaussian:
    whole = Gaussian()
    for group in groups:
        whole.merge(group)
    return whole


@cache
def settings() -> dict[str, str]:
    return {
        "version": varptq.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("width", "method", "seed", "count", "network"))


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    if arguments.compile:
        compile_quantizers()
    weights = Path(os.environ["VARPTQ_WEIGHTS"])
    network = arguments.network or f"{RESNET56}:{weights / CLASSIFIER}"
    started = time.monotonic()
    study = STUDIES[arguments.model]
    bench = Bench(
        arguments.model, arguments.out, weights, network, arguments.count, arguments.float_images
    )
    print(f"float samples and features: {time.monotonic() - started:.0f} s", flush=True)
    there = {key(line) for name in (study.name, PRESET_IMAGES) for line in read_lines(name)}
    widths, methods = (
        arguments.widths or study.widths,
        arguments.methods or (*study.methods, *ABLATION),
    )
    for row in rows(study, widths, methods, arguments.seeds):
        identity = {**row._asdict(), "count": arguments.count, "network": bench.network.name}
        if key(identity) in there:
            continue
        started = time.monotonic()
        line = identity | bench.measure(row) | {"float_images": arguments.float_images}
        seconds = time.monotonic() - started
        append_line(PRESET_IMAGES if row.method == PRESET else study.name, line | settings())
        print(f"{row.name}: {line['images']}, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=STUDIES, default="demo")
    parser.add_argument("--count", type=int, default=1000, help="images per row")
    parser.add_argument("--float-images", type=int, default=10_000, help="of the float set")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--widths", nargs="+", help="default: all of the model's study")
    parser.add_argument("--methods", nargs="+", help="default: all of the model's study")
    parser.add_argument("--network", help="kind:FILE, ResNet-56 if not given")
    parser.add_argument("--out", type=Path, default=Path("out/methods"))
    parser.add_argument("--compile", action="store_true", help="compile the quantizers")
    parser.add_argument("--threads", type=int, default=1)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
