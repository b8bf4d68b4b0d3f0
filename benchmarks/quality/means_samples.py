"""How many images smoothing and the means of centred inputs need, where rounding is to nearest.

    python -m benchmarks.quality.means_samples [--models demo twin] [--seeds 0 1 2]

For every seed the float model draws as many images as the most samples; fewer are the first of
them. KL is that of quality4bit.py, run 13, on the integers of runtime cpu. Appends one line per
measurement to results/means_samples.jsonl and skips what is there. docs/log.md has the conclusion.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import torch

import varptq
from benchmarks.common.kl_judge import Judge, on_integers
from benchmarks.common.quality4bit_rows import MODELS
from benchmarks.common.results import append_line, read_lines
from benchmarks.common.twin import with_outliers
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import center_inputs
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import smoothed
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert, convert_autoencoder
from varptq.quant.pipeline import QuantizedPipeline

# No calibration uses it.
HELD_OUT_SEED = 77_000
NAME = "means_samples"
CONFIGS, SAMPLES, SEEDS, IMAGES = ("w4a4", "w8a8"), (8, 16, 32, 64, 128, 256), (0, 1, 2), 64


def drawn(pipe: Pipeline, count: int, seed: int) -> CalibrationSet:
    settings = CalibrationConfig(num_samples=count)
    return calibration_set(pipe, settings, seed=seed, resampled=False)


def rounded(pipe: Pipeline, name: str, samples: CalibrationSet) -> QuantizedPipeline:
    """Method `rtn` on these images."""
    config = QuantConfig.preset(name)
    smooth, _ = smoothed(pipe, config, lambda: samples)
    var = convert(smooth.var, config)
    center_inputs(smooth, var, samples)
    vae = convert_autoencoder(pipe.vae, config)
    return QuantizedPipeline.of(pipe, var, vae, config=config, method="rtn")


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--images", type=int, default=IMAGES, help="that the KL is measured on")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    demo = varptq.load_model("demo")
    judge = Judge(demo, drawn(demo, asked.images, HELD_OUT_SEED))
    pipes = {"demo": demo, "twin": with_outliers(demo)}

    @cache
    def images(seed: int) -> CalibrationSet:
        return drawn(demo, max(asked.samples), seed)

    there = {
        (x["model"], x["config"], x["seed"], x["samples"], x["images"]) for x in read_lines(NAME)
    }
    for seed in asked.seeds:
        for model in asked.models:
            for config in asked.configs:
                for count in asked.samples:
                    key = (model, config, seed, count, asked.images)
                    if key in there:
                        continue
                    made = rounded(pipes[model], config, images(seed).first(count))
                    kl = judge.kl(on_integers(made))["kl"]
                    names = ("model", "config", "seed", "samples", "images")
                    append_line(NAME, dict(zip(names, key, strict=True)) | {"kl": kl})
                    say(f"{model} {config}, seed {seed}, {count} images: KL {kl:.5f}")


if __name__ == "__main__":
    main()
