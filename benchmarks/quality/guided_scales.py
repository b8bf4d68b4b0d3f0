"""Guidance of the first scales only: what it saves and what it changes, for every number of scales.

    python -m benchmarks.quality.guided_scales [--count 1000] [--only time] [--artifact FOLDER]

On the demo model, float and `w8a8` on runtime cpu. Images of one seed are compared with those that
are guided at all scales, by the same model: LPIPS, Frechet distance in ResNet-56 features, and the
classifier's accuracy; two sets of the float model with other seeds say what chance alone moves.
KL is between the distributions guided at all scales and at some, the float model's, per token.
Times are of one image of VAR-d16's shapes with random weights, `w8a8` on runtime cpu, one thread,
in seconds of the processor, medians over rounds that take turns. Writes
results/guided_scales.json and, between markers, docs/tables/guided_scales.md. VARPTQ_WEIGHTS names
the folder of measuring networks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import varptq
from benchmarks.common.held_out import held_out
from benchmarks.common.judges import CLASSIFIER, FEATURE_BATCH, LPIPS, RESNET56
from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import RESULTS, read_document, write_document
from varptq.evaluate.features import load_network, part_of
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.sampling import SampleSet, sample_set
from varptq.models.pipeline import Pipeline
from varptq.models.reading import guided_logits, kl_divergence
from varptq.models.sampling import SamplingSettings

NAME, ROUNDS, OTHER_SEEDS = "guided_scales", 3, (1, 2)
TABLE = DOCS / "tables/guided_scales.md"


class Judges:
    """The networks, and what they say of sets of samples beside the guided one."""

    def __init__(self, weights: Path) -> None:
        self.network = load_network(f"{RESNET56}:{weights / CLASSIFIER}")
        self.lpips = Lpips.load(weights / LPIPS)

    def features(self, samples: SampleSet) -> tuple[Gaussian, float]:
        """Moments of a set, and the share that the classifier calls by its class."""
        found, hits = Gaussian(), 0
        for shard in samples.shards():
            for start in range(0, len(shard.images), FEATURE_BATCH):
                part = slice(start, start + FEATURE_BATCH)
                features = self.network(torch.from_numpy(shard.images[part].copy()))
                found.update(features.pooled)
                called = part_of(features, "probabilities", RESNET56).argmax(-1).numpy()
                hits += int((called == shard.labels[part]).sum())
        return found, hits / len(samples)

    def apart(self, ours: SampleSet, theirs: SampleSet) -> float:
        """Mean LPIPS of pairs."""
        total = 0.0
        for one, other in zip(ours.shards(), theirs.shards(), strict=True):
            pair = (torch.from_numpy(shard.images.copy()) for shard in (one, other))
            total += float(self.lpips(*pair).double().sum())
        return total / len(ours)


def images(pipe: Pipeline, judges: Judges, out: Path, count: int) -> Iterator[dict[str, Any]]:
    """A line per number of guided scales, all of them first; then the other seeds."""

    def drawn(guided: int, seed: int) -> SampleSet:
        settings = SamplingSettings(guided_scales=guided)
        return sample_set(pipe, out / f"{guided}-{seed}", count=count, seed=seed, settings=settings)

    scales = pipe.scales.num_scales
    whole = drawn(scales, 0)
    moments, _ = judges.features(whole)
    sets = [(k, 0, drawn(k, 0)) for k in range(scales, -1, -1)]
    for guided, seed, samples in [*sets, *((scales, s, drawn(scales, s)) for s in OTHER_SEEDS)]:
        found, accuracy = judges.features(samples)
        line = {"guided": guided, "seed": seed, "accuracy": accuracy}
        line["fd"] = frechet_distance(found, moments)
        line["lpips"] = judges.apart(samples, whole)
        print(line, flush=True)
        yield line


@torch.no_grad()
def divergences(pipe: Pipeline) -> list[float]:
    """KL per token by number of guided scales, 0 first."""
    test, scales = held_out(pipe), pipe.scales
    found = []
    for guided in range(scales.num_scales + 1):
        pairs = zip(
            guided_logits(pipe, test.prompts, test.tokens),
            guided_logits(pipe, test.prompts, test.tokens, guided_scales=guided),
            strict=True,
        )
        total = sum(float(kl_divergence(p, q).sum()) for (_, p), (_, q) in pairs)
        found.append(total / test.tokens.numel())
    return found


def times(artifact: Path | None) -> list[float]:
    """Median seconds of the processor for an image, per number of guided scales, 0 first."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if artifact is None:
            artifact = Path(folder) / "d16"
            calibration = varptq.CalibrationConfig(num_samples=1)
            config, pipe = varptq.QuantConfig.preset("w8a8"), varptq.build_model("var-d16", seed=0)
            varptq.save(
                varptq.quantize(pipe, config, method="rtn", calibration=calibration), artifact
            )
        pipe = varptq.load(artifact, runtime="cpu")
        counts = range(pipe.scales.num_scales + 1)
        found: list[list[float]] = [[] for _ in counts]
        for _ in range(ROUNDS):
            for guided in counts:
                started = time.process_time()
                varptq.generate(pipe, [1], guided_scales=guided)
                found[guided].append(time.process_time() - started)
    return [statistics.median(seconds) for seconds in found]


def report(document: dict[str, Any]) -> None:
    """The tables, between their markers."""
    lines = []
    for name, rows in document["images"].items():
        for row in rows:
            seed = f", seed {row['seed']}" if row["seed"] else ""
            kl = "" if row["seed"] else f"{document['kl'][row['guided']]:.3f}"
            cells = [f"{row['guided']}{seed}", kl, f"{row['lpips']:.4f}", f"{row['fd']:.3f}"]
            lines.append([name, *cells, f"{row['accuracy']:.1%}"])
    head = ["model", "guided scales", "KL", "LPIPS", "FD", "accuracy"]
    replace(TABLE, "guided scales", table(head, lines))
    seconds = document["seconds"]
    shares = [[str(k), f"{x:.2f}", f"{x / seconds[-1]:.0%}"] for k, x in enumerate(seconds)]
    head = ["guided scales", "s", "of all guided"]
    replace(TABLE, "guided scales times", table(head, shares[::-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000, help="images per set")
    parser.add_argument("--out", type=Path, default=Path("out/guided_scales"))
    parser.add_argument("--artifact", type=Path, help="of VAR-d16 at w8a8; default: made here")
    parser.add_argument("--only", choices=("images", "time"), help="default: both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    there = (RESULTS / f"{NAME}.json").exists()
    empty: dict[str, Any] = {"images": {}, "kl": [], "seconds": []}
    document = read_document(NAME) if there else empty
    if arguments.only != "time":
        judges, pipe = Judges(Path(os.environ["VARPTQ_WEIGHTS"])), varptq.load_model("demo")
        document["kl"] = divergences(pipe)
        folder = arguments.out / "model"
        if not folder.exists():
            calibration = varptq.CalibrationConfig.preset("fast")
            config = varptq.QuantConfig.preset("w8a8")
            varptq.save(varptq.quantize(pipe, config, calibration=calibration, seed=0), folder)
        for name, one in (("float", pipe), ("w8a8", varptq.load(folder, runtime="cpu"))):
            place = arguments.out / name
            document["images"][name] = list(images(one, judges, place, arguments.count))
    if arguments.only != "images":
        document["seconds"] = times(arguments.artifact)
    write_document(NAME, document)
    if all(document.values()):
        report(document)


if __name__ == "__main__":
    main()
