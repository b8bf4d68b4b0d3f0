"""Does every part of the method help? KL to the float model, and errors of p v, per calibration.

    python -m benchmarks.quality.proof [--seeds 0 1 2] [--widths ...] [--methods ...] [--samples N]
    python -m benchmarks.quality.proof --model demo-text --widths w4a4+paper

Appends one line per calibration to results/proof.jsonl (proof_text.jsonl for the text demo) and
skips what is there, so it can be stopped and started, and split over processes by --seeds.
`proof_report.py` makes docs/tables/proof.md from that file, `methods_report.py` takes the token
measures of its table from it. Held-out images are of other seeds than any calibration's.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import torch

import varptq
from benchmarks.common.held_out import CALIBRATION, held_out
from benchmarks.common.methods_rows import calibration_method, preset_part
from benchmarks.common.proof_rows import METHODS, NAMES, SEEDS, WIDTHS
from benchmarks.common.results import append_line, read_lines
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet
from varptq.evaluate.attention import product_errors
from varptq.evaluate.tokens import token_fidelity
from varptq.models.cross import Mixes
from varptq.models.pipeline import Pipeline


def done(name: str) -> set[tuple[str, str, int, int]]:
    return {
        (x["width"], x["method"], x["seed"], x["calibration"]["num_samples"])
        for x in read_lines(name)
    }


def one(
    pipe: Pipeline,
    test: CalibrationSet,
    width: str,
    method: str,
    seed: int,
    calibration: CalibrationConfig,
) -> dict[str, Any]:
    """Calibrate once and measure; "sas+litevar" is the method sas on "<width>+litevar", "litevar"
    is brecq on it."""
    name = calibration_method(method)
    config = varptq.QuantConfig.preset(width + preset_part(method))
    started = time.monotonic()
    quantized = varptq.quantize(pipe, config, method=name, calibration=calibration, seed=seed)
    seconds = time.monotonic() - started
    fidelity = token_fidelity(pipe, quantized, test.prompts, test.tokens)
    mixes = list(Mixes.of(quantized.var).tokens.values())
    products = product_errors(pipe, mixes, test.prompts[:20], test.tokens[:20])
    units = quantized.report.get("units", [])
    return {
        "width": width,
        "method": method,
        "seed": seed,
        "seconds": round(seconds, 1),
        "theta": quantized.theta,
        "fidelity": fidelity.to_dict(),
        "product_error": products.mean(0).tolist(),
        "loss_hard_to_nearest": [u["loss_hard"] / u["loss_nearest"] for u in units],
        "resampling": quantized.report.get("resampling"),
        "calibration": calibration.to_dict(),
        "version": varptq.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    pipe, results = varptq.load_model(arguments.model), NAMES[arguments.model]
    test = held_out(pipe)
    calibration = CALIBRATION.replace(num_samples=arguments.samples)
    for seed in arguments.seeds:
        for width in arguments.widths:
            for method in arguments.methods:
                if (width, method, seed, arguments.samples) in done(results):
                    continue
                line = one(pipe, test, width, method, seed, calibration)
                append_line(results, line)
                kl = line["fidelity"]["kl_filtered"]
                print(f"{width} {method} seed {seed}: kl {kl:.4f}, {line['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=NAMES, default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--widths", nargs="+", default=WIDTHS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--samples", type=int, default=CALIBRATION.num_samples)
    parser.add_argument("--threads", type=int, default=2)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
