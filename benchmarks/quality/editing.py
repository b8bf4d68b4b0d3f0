"""Editing with quantized models: CIFAR-10 test images, the centre regenerated, demo model.

    VARPTQ_WEIGHTS=/folder python -m benchmarks.quality.editing

Needs cifar10_test_2000.npz, lpips_alex.safetensors and resnet56_cifar10.safetensors in that folder
(docs/metrics.md). One line per model and task goes to results/editing.jsonl, what is there is
skipped, so it can be stopped and started; artifacts and edited images stay in out/editing. At the
end docs/tables/editing.md (between its markers) and docs/images/editing.png are made.

Image i draws from the same noise with every model. LPIPS and PSNR compare the regenerated square
with the original (LPIPS after enlarging it to 64 x 64); FD compares the pasted images
with the test images that are not edited, on 64 features of the ResNet-56, and is no FID.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import varptq
from benchmarks.common.edits import Box, edited
from benchmarks.common.judges import CLASSIFIER, LPIPS, REFERENCE, RESNET56
from benchmarks.common.methods_rows import calibration_method, preset_part
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import Line, append_line, read_lines
from varptq.calibrate.config import CalibrationConfig
from varptq.editing.edit import encode
from varptq.evaluate.features import FeatureNetwork, load_network
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.paired import psnr
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import UNCONDITIONAL
from varptq.pictures import Block, Pixels, Row, sheet, to_pixels, write_png

NAME = "editing"
CACHE = DOCS.parent / "out" / NAME
PRESETS = ("w6a6+paper", "w4a4+paper")
METHODS = ("rtn", "brecq", "sas", "sas+litevar")
MODELS = (("float", ""), *((preset, method) for preset in PRESETS for method in METHODS))
CALIBRATION = CalibrationConfig(num_samples=64, steps=100)
IMAGES, SEED = 500, 0
# Classes to change to: a fixed step away, so that each class is asked for equally often.
CLASS_STEP = 3
LPIPS_SIDE, BATCH, SHOWN = 64, 50, 10
CENTRE, WIDE = (0.25, 0.25, 0.75, 0.75), (0.125, 0.125, 0.875, 0.875)


@dataclass(frozen=True)
class Task:
    """What is asked of every image; without guidance its own class is what should be seen."""

    name: str
    heading: str
    box: Box
    cfg: float = 0.0

    def asked(self, labels_N: Tensor) -> Tensor:
        return (labels_N + CLASS_STEP) % 10 if self.cfg else labels_N

    def region(self, images: Pixels) -> Pixels:
        side = images.shape[1]
        x0, y0, x1, y1 = (round(value * side) for value in self.box)
        return images[:, y0:y1, x0:x1]


TASKS = (
    Task("inpaint", "In-painting, unconditional", CENTRE),
    Task("class", f"Class-conditional, {CLASS_STEP} classes on, cfg 4", CENTRE, 4.0),
    Task("class-wide", f"The same over the square {WIDE}", WIDE, 4.0),
)


@dataclass
class Measures:
    """The originals (N, S, S, 3) with their classes, and what judges edits of them."""

    images: Pixels
    labels: Tensor
    others: Gaussian
    network: FeatureNetwork
    lpips: Lpips

    @classmethod
    def load(cls, folder: Path) -> Measures:
        with np.load(folder / REFERENCE) as file:
            images, labels = file["images"], torch.from_numpy(file["labels"]).long()
        network = load_network(f"{RESNET56}:{folder / CLASSIFIER}")
        others = Gaussian.of(network(torch.from_numpy(images[IMAGES:])).pooled)
        lpips = Lpips.load(folder / LPIPS)
        return cls(images[:IMAGES], labels[:IMAGES], others, network, lpips)

    def of(self, edited: Pixels, task: Task) -> Line:
        features = self.network(torch.from_numpy(edited))
        assert features.probabilities is not None
        first, second = task.region(self.images), task.region(edited)
        distances = self.lpips(enlarged(first), enlarged(second))
        seen = features.probabilities.argmax(-1)
        return {
            "lpips": float(distances.double().mean()),
            "psnr": psnr(first, second),
            "fd": frechet_distance(Gaussian.of(features.pooled), self.others),
            "accuracy": float((seen == task.asked(self.labels)).double().mean()),
        }


def enlarged(pixels: Pixels) -> Tensor:
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    size = (LPIPS_SIDE, LPIPS_SIDE)
    large = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).permute(0, 2, 3, 1)


def model(pipe: Pipeline, preset: str, method: str) -> Pipeline:
    """The float model, or the artifact of a preset and method, calibrated on first use."""
    if preset == "float":
        return pipe
    folder = CACHE / f"{preset}-{method}"
    if not folder.is_dir():
        name = calibration_method(method)
        config = varptq.QuantConfig.preset(preset + preset_part(method))
        varptq.save(
            varptq.quantize(pipe, config, method=name, calibration=CALIBRATION, seed=SEED), folder
        )
    return varptq.load(folder)


def edited_images(pipe: Pipeline, measures: Measures, task: Task) -> Pixels:
    classes = task.asked(measures.labels) if task.cfg else [UNCONDITIONAL] * IMAGES
    return edited(pipe, measures.images, classes, task.box, cfg=task.cfg, seed=SEED, batch=BATCH)


def round_trip(pipe: Pipeline, images: Pixels) -> Pixels:
    """The originals, encoded and decoded: what no model that writes tokens can do better."""
    originals = [Image.fromarray(image) for image in images]
    with torch.no_grad():
        decoded = pipe.vae.decode(encode(pipe, originals))
    return to_pixels(decoded.add(1).mul(0.5))


def one(pipe: Pipeline, measures: Measures, preset: str, method: str, task: Task) -> Line:
    quantized = model(pipe, preset, method)
    started = time.monotonic()
    made = edited_images(quantized, measures, task)
    seconds = time.monotonic() - started
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez(CACHE / f"{task.name}-{preset}-{method}.npz", images=made[:SHOWN])
    return {
        "preset": preset,
        "method": method,
        "task": task.name,
        "images": IMAGES,
        "seconds": round(seconds, 1),
        **measures.of(made, task),
        "calibration": CALIBRATION.to_dict() if method else None,
        "version": varptq.__version__,
        "torch": torch.__version__,
    }


def run(pipe: Pipeline, measures: Measures) -> None:
    done = {(line["preset"], line["method"], line["task"]) for line in read_lines(NAME)}
    for task in TASKS:
        for preset, method in MODELS:
            if (preset, method, task.name) in done:
                continue
            line = one(pipe, measures, preset, method, task)
            append_line(NAME, line)
            print({k: v for k, v in line.items() if k != "calibration"}, flush=True)


def table(rows: list[tuple[str, Line]]) -> list[str]:
    head = ["model", "LPIPS", "PSNR, dB", "FD", "accuracy"]
    text = [head, ["---"] * len(head)]
    for name, line in rows:
        distances = (f"{line['lpips']:.3f}", f"{line['psnr']:.2f}", f"{line['fd']:.2f}")
        text.append([name, *distances, f"{line['accuracy']:.3f}"])
    return ["| " + " | ".join(row) + " |" for row in text]


def title(preset: str, method: str) -> str:
    return f"{preset} {method}".strip()


def grid(measures: Measures, tasks: list[Task]) -> Image.Image:
    blocks = []
    for task in tasks:
        rows = [Row(measures.images[:SHOWN], "original")]
        for preset, method in MODELS:
            with np.load(CACHE / f"{task.name}-{preset}-{method}.npz") as file:
                rows.append(Row(file["images"], title(preset, method)))
        blocks.append(Block(rows, task.heading))
    return sheet(blocks, across=1, zoom=2)


def report(pipe: Pipeline, measures: Measures) -> None:
    """docs/tables/editing.md and its picture, of the tasks that every model has done."""
    lines = {(line["preset"], line["method"], line["task"]): line for line in read_lines(NAME)}
    decoded = measures.of(round_trip(pipe, measures.images), TASKS[0])
    untouched = measures.network(torch.from_numpy(measures.images))
    floor = frechet_distance(Gaussian.of(untouched.pooled), measures.others)
    text = [
        f"{IMAGES} images of the CIFAR-10 test set, the square {CENTRE} regenerated; calibration "
        f"with {CALIBRATION.num_samples} samples and {CALIBRATION.steps} steps. FD of the images "
        f"as they are is {floor:.2f}.",
        "",
    ]
    measured = [t for t in TASKS if all((*m, t.name) in lines for m in MODELS)]
    for task in measured:
        rows = [(f"`{title(p, m)}`", lines[p, m, task.name]) for p, m in MODELS]
        if not task.cfg:
            rows = [("encoded and decoded", decoded), *rows]
        text += [f"**{task.heading}:**", "", *table(rows), ""]
    text += ["![the first images, edited by every model](../images/editing.png)", ""]
    write_png(DOCS / "images" / "editing.png", grid(measures, measured))
    replace(DOCS / "tables/editing.md", "editing", text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="of what is there, nothing is run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = os.environ.get("VARPTQ_WEIGHTS")
    if not folder:
        parser.error("VARPTQ_WEIGHTS: not set; name the folder with the images and networks")
    pipe, measures = varptq.load_model("demo"), Measures.load(Path(folder))
    if not arguments.report:
        run(pipe, measures)
    report(pipe, measures)


if __name__ == "__main__":
    main()
