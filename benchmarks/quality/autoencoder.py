"""What the autoencoder of the demo models loses in bfloat16 and in 8 bits.

    VARPTQ_WEIGHTS=/folder python -m benchmarks.quality.autoencoder [--quick]

Decoders: the same tokens, which the float model samples (cfg as it comes), decoded by the quantized
decoder and by the float32 one. PSNR and LPIPS over the pairs; FD between the two sets in ResNet-56
features, beside that of two halves of the float32 set, which is chance. Encoders: real images of
the CIFAR-10 test set; the share of tokens (bits of them, for a model of bits) that are those of the
float32 encoder, and PSNR of the rebuilt images to the real ones, both decoded in float32. Writes
results/autoencoder.json and the tables between the "autoencoder" markers of
docs/tables/autoencoder.md.
"""

from __future__ import annotations

import argparse
import math
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
from varptq.artifact.sizes import VAE, sizes
from varptq.evaluate.features import load_network
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.paired import psnr
from varptq.models.autoencoder import Autoencoder
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import balanced
from varptq.pictures import Pixels, to_pixels
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert_autoencoder
from varptq.quant.find import quant_convolutions

SEED = 11
MODELS = ("demo", "demo-text")
FLOAT = QuantConfig.preset("w8a8+vae32")
# Inputs of the decoder in float are no precision of a config, so this one is made by hand.
WEIGHTS_ALONE = "int8, inputs of the decoder in float"
VARIANTS = {
    "float32": FLOAT,
    "bf16 (`+vae16`)": QuantConfig.preset("w8a8+vae16"),
    "bf16, ends too": FLOAT.replace(autoencoder="bf16"),
    "int8 (bare presets)": QuantConfig.preset("w8a8"),
    WEIGHTS_ALONE: QuantConfig.preset("w8a8"),
    "int8, ends in bf16": QuantConfig.preset("w8a8").with_rules(
        *(LayerRule(targets=f"*.conv_{end}", autoencoder="bf16") for end in ("in", "out"))
    ),
    "int8, ends too": FLOAT.replace(autoencoder="int8"),
}
Line = dict[str, Any]


class Judge:
    """Real images and the networks."""

    def __init__(self, weights: Path, count: int) -> None:
        with np.load(weights / REFERENCE) as file:
            self.images: Pixels = file["images"][:count]
        self.network = load_network(f"{RESNET56}:{weights / CLASSIFIER}")
        self.lpips = Lpips.load(weights / LPIPS)

    def gaussian(self, images: Pixels) -> Gaussian:
        found = Gaussian()
        for part in torch.from_numpy(images).split(FEATURE_BATCH):
            found.update(self.network(part).pooled)
        return found

    def fd(self, left: Pixels, right: Pixels) -> float:
        return frechet_distance(self.gaussian(left), self.gaussian(right))

    def apart(self, left: Pixels, right: Pixels) -> float:
        parts = (torch.from_numpy(images).split(FEATURE_BATCH) for images in (left, right))
        distances = torch.cat([self.lpips(*pair) for pair in zip(*parts, strict=True)])
        return float(distances.double().mean())


def variant(pipe: Pipeline, name: str) -> Autoencoder:
    vae = convert_autoencoder(pipe.vae, VARIANTS[name])
    if name == WEIGHTS_ALONE:
        for layer in quant_convolutions(vae).values():
            layer.on_codes = False
    return vae


@torch.no_grad()
def decoded(vae: Autoencoder, tokens: Tensor) -> Pixels:
    parts = [vae.decode(part).add(1).mul(0.5) for part in tokens.split(FEATURE_BATCH)]
    return to_pixels(torch.cat(parts))


@torch.no_grad()
def encoded(vae: Autoencoder, images: Pixels) -> Tensor:
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([vae.encode(part) for part in planes.split(FEATURE_BATCH)])


def measure(judge: Judge, model: str, samples: int) -> list[Line]:
    pipe = varptq.load_model(model)
    pool = pipe.pool()
    prompts = pool[balanced(len(pool), samples, SEED)]
    tokens = varptq.generate(pipe, prompts, seed=SEED, decode=False, batch_size=50).tokens
    exact, ids = decoded(pipe.vae, tokens), encoded(pipe.vae, judge.images)
    chance, found = judge.fd(exact[::2], exact[1::2]), []
    for name, config in VARIANTS.items():
        vae = variant(pipe, name)
        ours, own_ids = decoded(vae, tokens), encoded(vae, judge.images)
        stored = Pipeline(pipe.var, vae, model, family=pipe.family)
        distance = psnr(exact, ours)
        line = {
            "model": model,
            "variant": name,
            "precision": config.autoencoder,
            "bytes": sizes(stored)[VAE].bytes,
            # None where no pixel differs.
            "psnr": distance if math.isfinite(distance) else None,
            "lpips": judge.apart(exact, ours),
            "fd": judge.fd(exact, ours),
            "chance": chance,
            "agree": float((own_ids == ids).double().mean()),
            "rebuilt": psnr(judge.images, decoded(pipe.vae, own_ids)),
        }
        print(line, flush=True)
        found.append(line)
    return found


def rows(lines: list[Line]) -> list[str]:
    head = ["autoencoder", "MB", "PSNR, dB", "LPIPS", "FD to float32"]
    head += ["ids or bits as float32's", "rebuilt, dB"]
    cells = [
        [
            line["variant"],
            f"{line['bytes'] / 1e6:.2f}",
            "exact" if line["psnr"] is None else f"{line['psnr']:.1f}",
            f"{line['lpips']:.5f}",
            f"{line['fd']:.4f}",
            f"{100 * line['agree']:.1f}%",
            f"{line['rebuilt']:.2f}",
        ]
        for line in lines
    ]
    return table(head, cells)


def report(document: Line) -> list[str]:
    found: list[str] = []
    for model in MODELS:
        lines = [line for line in document["lines"] if line["model"] == model]
        found += [
            f"`{model}`; FD of chance, two halves of the float32 set: {lines[0]['chance']:.2f}"
        ]
        found += ["", *rows(lines)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = 16 if options.quick else 200
    judge = Judge(Path(os.environ["VARPTQ_WEIGHTS"]), count)
    document = {"images": count, "lines": [x for m in MODELS for x in measure(judge, m, count)]}
    if options.quick:
        print("\n".join(report(document)))
        return
    write_document("autoencoder", document)
    replace(DOCS / "tables" / "autoencoder.md", "autoencoder", report(document))


if __name__ == "__main__":
    main()
