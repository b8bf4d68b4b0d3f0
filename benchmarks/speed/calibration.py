"""What calibration costs and gives.

    python -m benchmarks.speed.calibration [--quick] [--parts ...] [--efforts ...] [--json FILE]

recording   one pass that feeds all units of a d16, against a replay per unit (calibration_steps.py)
step        one step of learned rounding per kind of unit, all scales in one pass, against the loop
            over scales, and how far their gradients are apart; float32 and bfloat16 autocast
effort      seconds and KL to the float model on the demo model, as proof.py measures it, for both
            the paper's assignment of quantizers and the default one
d16         seconds of `fast` on random weights of the d16 shapes at 1 and 2 blocks and few samples
            (--d16-samples); runs with different numbers of samples give a line, on which its own
            number of samples and all 16 blocks lie, every block costing the same
memory      peak of resident memory of two blocks of the d30 width under --memory

Seconds are those of the processor, one thread. --quick: fewer rows and repeats. Parts that are not
asked for keep their earlier results in the file, as do other efforts and numbers of samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import varptq
from benchmarks.common.calibration_steps import (
    BLOCKS,
    CONFIG,
    model_of,
    random_samples,
    recording,
    steps,
    totals,
)
from benchmarks.common.held_out import held_out
from benchmarks.common.results import RESULTS
from varptq.calibrate import reconstruct as reconstruct_module
from varptq.calibrate.config import EFFORTS, CalibrationConfig
from varptq.calibrate.record import Recorder
from varptq.evaluate.tokens import token_fidelity
from varptq.models.presets import PRESETS
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert

PARTS = ("recording", "step", "effort", "d16", "memory")
DEFAULT_CONFIG = "w4a4"


def efforts(names: list[str], configs: list[str]) -> list[dict[str, Any]]:
    pipe = varptq.load_model("demo")
    test = held_out(pipe)
    lines = []
    for config in configs:
        for name in names:
            calibration = CalibrationConfig.preset("fast" if name == "rtn" else name)
            method = "rtn" if name == "rtn" else "brecq"
            quant = QuantConfig.preset(config)
            started = time.process_time()
            model = varptq.quantize(pipe, quant, method=method, calibration=calibration)
            spent = time.process_time() - started
            kl = token_fidelity(pipe, model, test.prompts, test.tokens).kl_filtered
            lines.append({"config": config, "effort": name, "seconds": spent, "kl": kl})
            print(f"{config}, {name}: {spent:.0f} s, KL {kl:.4f}", flush=True)
    return lines


def merged(part: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newer one of lines alike, in the order of cost."""
    if part == "d16":
        lines = {line["samples"]: line for line in (*old, *new)}
        return [lines[samples] for samples in sorted(lines)]
    efforts_ = {(line["config"], line["effort"]): line for line in (*old, *new)}
    order = ("rtn", *EFFORTS)
    return [efforts_[key] for key in sorted(efforts_, key=lambda k: (k[0], order.index(k[1])))]


def d16(samples: int) -> list[dict[str, Any]]:
    """`fast` with as many samples on random weights, whole runs of the command's own call."""
    calibration = CalibrationConfig.preset("fast").replace(num_samples=samples)
    found = {}
    for depth in (1, BLOCKS):
        pipe = model_of("var-d16", depth)
        started = time.process_time()
        config = QuantConfig.preset(DEFAULT_CONFIG)
        varptq.quantize(pipe, config, method="brecq", calibration=calibration)
        found[depth] = time.process_time() - started
        print(f"d16 shapes, {depth} blocks: {found[depth]:.0f} s", flush=True)
    depth = PRESETS["var-d16"].transformer_arch.depth
    block = (found[BLOCKS] - found[1]) / (BLOCKS - 1)
    whole = found[1] + (depth - 1) * block
    return [{"samples": samples, "blocks": found, "seconds_per_block": block, "seconds": whole}]


def memory(samples: int, gibibytes: float, dtype: str) -> dict[str, Any]:
    """Two blocks of the d30 width, one step per block unit, activations within the budget."""
    # Rows are evaluated eight at a time, so more of them take time and no memory.
    reconstruct_module.EVALUATED_ROWS = 8
    started = time.perf_counter()
    pipe = model_of("var-d30")
    pipe.var.to(getattr(torch, dtype))
    model = convert(pipe.var, QuantConfig.preset(CONFIG))
    before = peak()
    with tempfile.TemporaryDirectory() as spool:
        config = CalibrationConfig(
            num_samples=samples, steps=1, batch_size=2, memory_gb=gibibytes, spool_dir=spool
        )
        for unit in Recorder(
            pipe, model.get_submodule, random_samples(pipe, samples), config
        ).units():
            if unit.name.endswith((".attn", ".ffn")):
                reconstruct_module.reconstruct_unit(unit, config, 0)
                print(f"{unit.name}: peak so far {peak():.1f} GiB", flush=True)
    return {
        "samples": samples,
        "memory_gb": gibibytes,
        "dtype": dtype,
        "model_gib": before,
        "peak_gib": peak(),
        "wall_seconds": time.perf_counter() - started,
    }


def peak() -> float:
    """Most resident memory of this process so far, in GiB (mapped pages of spool files count)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--efforts", nargs="+", default=["rtn", *EFFORTS])
    parser.add_argument("--configs", nargs="+", default=[CONFIG, DEFAULT_CONFIG])
    parser.add_argument("--samples", type=int, default=256, help="of the memory run")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of its activations")
    parser.add_argument("--dtype", default="float32", help="of its model")
    parser.add_argument("--d16-samples", type=int, default=8)
    parser.add_argument("--json", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, repeats = (1, 3) if arguments.quick else (2, 5)
    makers: dict[str, Callable[[], Any]] = {
        "recording": lambda: recording(count, repeats),
        "step": lambda: steps(count, repeats),
        "effort": lambda: efforts(arguments.efforts, arguments.configs),
        "d16": lambda: d16(arguments.d16_samples),
        "memory": lambda: memory(arguments.samples, arguments.memory, arguments.dtype),
    }
    for part in arguments.parts:
        made = makers[part]()
        print(part, json.dumps(made, indent=1), flush=True)
        store(arguments.json, part, made, arguments.threads)


def store(path: Path, part: str, made: Any, threads: int) -> None:
    """Put a part into the file as it is now: another run may have written to it meanwhile."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found[part] = merged(part, found.get(part, []), made) if isinstance(made, list) else made
    if "recording" in found and "step" in found:
        found["total"] = totals(found["recording"], found["step"])
        print("total", json.dumps(found["total"]), flush=True)
    found["settings"] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": threads,
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
