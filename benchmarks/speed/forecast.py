"""What `varptq quantize` foretells, and what it then takes.

    python -m benchmarks.speed.forecast [--settings "demo rtn 32" ...] [--threads 1] [--config w4a4]

A setting is MODEL METHOD IMAGES [STEPS]; MODEL/BLOCKS has random weights and so many blocks of that
model's shapes. Prints a line for each: seconds and peak of resident memory, foretold and found,
each in a process of its own. On a busy machine compare the seconds of the processor: other programs
come and go between the two.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

import varptq
from benchmarks.common.few_blocks import build
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.forecast import forecast
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig

SETTINGS = (
    *("demo rtn 32", "demo gptq 16", "demo brecq 16 20"),
    *("var-d16/3 rtn 4", "var-d16/1 gptq 2", "var-d16/1 brecq 2 5"),
)
CONFIG = "w4a4"


def model_of(name: str) -> Pipeline:
    base, _, blocks = name.partition("/")
    return build(base, int(blocks), torch.float32) if blocks else varptq.load_model(base)


def measured(setting: str, threads: int, preset: str) -> dict[str, Any]:
    """Foretold and found, in this process."""
    torch.set_num_threads(threads)
    model, method, images, *steps = setting.split()
    calibration = CalibrationConfig(num_samples=int(images))
    if steps:
        calibration = calibration.replace(steps=int(steps[0]))
    pipe, config = model_of(model), QuantConfig.preset(preset)
    before = time.process_time()
    said = forecast(pipe, config, method=method, calibration=calibration)
    probed = time.process_time() - before
    started, computed = time.monotonic(), time.process_time()
    varptq.quantize(pipe, config, method=method, calibration=calibration)
    return {
        "setting": setting,
        "probe": said.probe_seconds,
        "probe_processor": probed,
        "foretold": said.seconds,
        "foretold_processor": said.processor,
        "seconds": time.monotonic() - started,
        "processor": time.process_time() - computed,
        "foretold_bytes": said.memory,
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parts": said.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked.one, asked.threads, asked.config)))
        return
    for setting in asked.settings:
        words = ["-m", "benchmarks.speed.forecast", "--one", setting]
        words += ["--threads", str(asked.threads), "--config", asked.config]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        line = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{setting}: {line['foretold']:.1f} s foretold in {line['probe']:.1f} s "
            f"({line['probe_processor']:.1f} of the processor), "
            f"{line['seconds']:.1f} s found; of the processor "
            f"{line['foretold_processor']:.1f} s and {line['processor']:.1f} s; "
            f"{line['foretold_bytes'] / 1e6:.0f} MB foretold, {line['bytes'] / 1e6:.0f} MB found",
            flush=True,
        )


if __name__ == "__main__":
    main()
