"""The demo model's decoder before and after it was trained on (examples/train_demo/decoder.py).

    git show 3387ae7~:src/varptq/assets/demo/vae_demo.safetensors > before.safetensors
    VARPTQ_WEIGHTS=/folder python -m benchmarks.quality.demo_decoder --before before.safetensors

Both decode the same tokens: those of the 2,000 real test images, and as many the float model
samples. FD is to the real images, in ResNet-56 features. Writes results/demo_decoder.json and the
table between the "decoder" markers of docs/tables/demo_decoder.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import varptq
from benchmarks.common.judges import CLASSIFIER, FEATURE_BATCH, LPIPS, REFERENCE, RESNET56
from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import write_document
from varptq.evaluate.features import load_network, part_of
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.paired import psnr
from varptq.models.pipeline import Pipeline
from varptq.models.presets import ASSETS
from varptq.models.prompts import balanced
from varptq.pictures import Pixels, to_pixels

SEED = 0
Line = dict[str, Any]


class Judge:
    """The real images with their classes, and the networks."""

    def __init__(self, weights: Path) -> None:
        with np.load(weights / REFERENCE) as file:
            self.images, self.labels = file["images"], torch.from_numpy(file["labels"]).long()
        self.network = load_network(f"{RESNET56}:{weights / CLASSIFIER}")
        self.lpips = Lpips.load(weights / LPIPS)
        self.real, _ = self.seen(self.images, self.labels)

    def seen(self, images: Pixels, labels: Tensor) -> tuple[Gaussian, float]:
        """Features of the images, and the share called their class."""
        found, hits = Gaussian(), 0
        parts = zip(
            torch.from_numpy(images).split(FEATURE_BATCH), labels.split(FEATURE_BATCH), strict=True
        )
        for part, wanted in parts:
            features = self.network(part)
            found.update(features.pooled)
            called = part_of(features, "probabilities", RESNET56).argmax(-1).cpu()
            hits += int((called == wanted).sum())
        return found, hits / len(labels)

    def measure(self, images: Pixels, labels: Tensor) -> Line:
        features, accuracy = self.seen(images, labels)
        return {"fd": frechet_distance(features, self.real), "accuracy": accuracy}

    def apart(self, images: Pixels) -> Line:
        pairs = zip(
            torch.from_numpy(images).split(FEATURE_BATCH),
            torch.from_numpy(self.images).split(FEATURE_BATCH),
            strict=True,
        )
        distances = torch.cat([self.lpips(*pair) for pair in pairs])
        return {"psnr": psnr(self.images, images), "lpips": float(distances.double().mean())}


@torch.no_grad()
def decoded(pipe: Pipeline, ids_NL: Tensor) -> Pixels:
    parts = [pipe.vae.decode(part).add(1).mul(0.5) for part in ids_NL.split(FEATURE_BATCH)]
    return to_pixels(torch.cat(parts))


@torch.no_grad()
def encoded(pipe: Pipeline, images: Pixels) -> Tensor:
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([pipe.vae.encode(part) for part in planes.split(FEATURE_BATCH)])


def measure(judge: Judge, before: Path) -> dict[str, Line]:
    after = varptq.load_model("demo")
    var = ASSETS / "demo" / "var_demo.safetensors"
    models = {"before": varptq.load_model(var=var, vae=before), "after": after}
    real_ids = encoded(after, judge.images)
    assert torch.equal(real_ids, encoded(models["before"], judge.images)), "tokens have changed"
    labels = balanced(len(after.pool()), len(real_ids), SEED)
    sampled = varptq.generate(after, labels, seed=SEED, cfg=1.5, decode=False).tokens
    found: dict[str, Line] = {}
    for name, pipe in models.items():
        rebuilt = decoded(pipe, real_ids)
        found[name] = {
            "rebuilt": judge.measure(rebuilt, judge.labels) | judge.apart(rebuilt),
            "samples": judge.measure(decoded(pipe, sampled), labels),
        }
        print(name, found[name], flush=True)
    return found


def rows(found: dict[str, Line]) -> list[str]:
    head = ["decoder", "FD", "accuracy", "PSNR, dB", "LPIPS", "FD of samples", "their accuracy"]
    lines = []
    for name, line in found.items():
        rebuilt, samples = line["rebuilt"], line["samples"]
        cells = [name, f"{rebuilt['fd']:.2f}", f"{rebuilt['accuracy']:.3f}"]
        cells += [f"{rebuilt['psnr']:.2f}", f"{rebuilt['lpips']:.3f}"]
        lines.append([*cells, f"{samples['fd']:.2f}", f"{samples['accuracy']:.3f}"])
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="VQVAE of the earlier model")
    before = parser.parse_args().before
    torch.set_num_threads(1)
    found = measure(Judge(Path(os.environ["VARPTQ_WEIGHTS"])), before)
    write_document("demo_decoder", found)
    replace(DOCS / "tables/demo_decoder.md", "decoder", rows(found))


if __name__ == "__main__":
    main()
