"""A whole image on the CPU: float models, our simulated path and our integers, side by side.

    python -m benchmarks.speed.runtime_cpu [--quick] [--threads 1 2] [--batches 1 8] [--json FILE]
    python -m benchmarks.speed.runtime_cpu --json FILE --resume     # go on after an interruption

VAR-d16 with random weights and real shapes, one process, the variants (runtime_variants.py) in
turn, medians after a warm-up. Linears alone are native_linear.py, attention alone
native_attention.py, memory runtime_memory.py: this script runs them too, each in a process of its
own. With one thread the clock is CPU time. ONEDNN_MAX_CPU_ISA caps oneDNN's instruction set and
VARPTQ_ISA that of the native core; with the core on AMX the targets are those for AMX.
runtime_report.py makes the tables of docs/benchmarks.md.

Next to each of ours is its floor: the products of the Linears at the measured peak of the product
instruction or their packed bytes at the measured rate of reading memory, whichever is longer, scale
by scale; and all products of the decoder's convolutions at the same peak, though kernels may
multiply less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.linear_shapes import DEPTH, LAYERS, ROWS, SCHEMES
from benchmarks.common.results import found_by
from benchmarks.common.runtime_variants import PARTS, Seconds, Variant, variants
from benchmarks.common.timing import copy_rate
from varptq.models.pipeline import Pipeline, build_model
from varptq.native import binding

PRESETS = ("w8a8", "w6a6", "w4a8", "w2a8", "w4a4")
QUICK_PRESETS = ("w8a8", "w4a4")
# (must, aim) without and with AMX.
Targets = dict[str, tuple[tuple[float, float], tuple[float, float]]]
TARGETS: Targets = {
    "linears W8A8 over prepacked fp32": ((3.0, 3.6), (7.0, 9.0)),
    "linears W8A8 over prepacked bf16": ((1.6, 1.9), (1.3, 1.6)),
    "linears W4A8 over prepacked bf16": ((1.4, 1.7), (1.3, 1.8)),
    "linears W4A4 over prepacked bf16": ((1.25, 1.6), (1.1, 1.4)),
    "quantized attention over fp32 SDPA": ((2.0, 4.0), (2.0, 4.0)),
    "transformer over eager fp32": ((4.5, 6.0), (7.0, 10.0)),
    "transformer over prepacked bf16": ((1.4, 2.0), (1.25, 1.6)),
    "whole image over eager fp32": ((6.0, 8.0), (6.0, 8.0)),
    "whole image over eager bf16 autocast": ((1.5, 2.2), (1.5, 2.2)),
    "whole image over our own simulated path": ((6.0, 10.0), (6.0, 10.0)),
    "whole image over the fastest float": ((2.5, 3.0), (2.5, 3.0)),
}
FLOATS = ("eager fp32", "prepacked fp32", "eager bf16 autocast", "prepacked bf16")
# Not in the table of targets, for comparison.
OTHERS = ("transformer over torchao int8",)


def measure(found: dict[str, Variant], batch: int, rounds: int) -> dict[str, Seconds]:
    """Median seconds by part, variants in turn, after one warm-up round; of the simulated path, the
    slowest by far, one image without warm-up."""
    times: dict[str, list[Seconds]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, run in found.items():
            once = name == "simulated"
            if once and number:
                continue
            taken = run(batch)
            if number or once:
                times[name].append(taken)
    return {
        name: {part: statistics.median(t[part] for t in taken) for part in PARTS}
        for name, taken in times.items()
    }


def whole(seconds: Seconds) -> float:
    return sum(seconds.values())


def transformer(seconds: Seconds) -> float:
    """With sampling and token map."""
    return whole(seconds) - seconds["decoder"]


def ratios(times: dict[str, Seconds], preset: str) -> dict[str, float]:
    """Under the names of TARGETS; above one means that ours is faster."""
    ours = times[preset]
    fastest = min(FLOATS, key=lambda name: whole(times[name]) if name in times else math.inf)
    compared = {
        "transformer over eager fp32": (transformer, "eager fp32"),
        "transformer over prepacked bf16": (transformer, "prepacked bf16"),
        "transformer over torchao int8": (transformer, "torchao int8"),
        "whole image over eager fp32": (whole, "eager fp32"),
        "whole image over eager bf16 autocast": (whole, "eager bf16 autocast"),
        "whole image over our own simulated path": (whole, "simulated"),
        "whole image over the fastest float": (whole, fastest),
    }
    return {
        name: part(times[other]) / part(ours)
        for name, (part, other) in compared.items()
        if other in times
    }


def decoder_operations(pipe: Pipeline) -> int:
    """Of one image."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        pipe.vae.decode_features(torch.zeros(1, pipe.vae.arch.code_dim, 16, 16))
    return counter.get_total_flops()


def floors(batch: int, threads: int, decoder: int, presets: tuple[str, ...]) -> dict[str, Seconds]:
    """Seconds that the parts of our presets cannot go below on this machine."""
    peak, rate = binding.peak_gops() * 1e9 * threads, copy_rate(threads)
    found: dict[str, Seconds] = {}
    for preset in presets:
        weight_bits = SCHEMES[preset.upper()][1]
        linears = 0.0
        for _, inputs, outputs, times in LAYERS:
            for m in ROWS if times else (2,):
                read = inputs * outputs * (0.5 if weight_bits <= 4 else 1.0) / rate
                products = 2 * m * batch * inputs * outputs / peak if peak else 0.0
                linears += (times or DEPTH) * max(read, products)
        found[preset] = {"linears": linears, "decoder": batch * decoder / peak if peak else 0.0}
    return found


def column() -> int:
    """Which targets are meant: 0 without, 1 with AMX."""
    return int(binding.isa() == "amx")


def table(document: dict[str, Any], threads: int) -> dict[str, float]:
    """All measured ratios of the table, of one image: whole-image ones at W8A8."""
    found: dict[str, float] = {}
    linears = document.get("linears", {}).get(str(threads), {}).get("ratios", {})
    for scheme in ("W8A8", "W4A8", "W4A4"):
        for other, short in (("float32", "fp32"), ("bfloat16", "bf16")):
            name = f"linears {scheme} over prepacked {short}"
            if name in TARGETS and f"{scheme} over {other}" in linears:
                found[name] = linears[f"{scheme} over {other}"]
    if threads == 1 and "attention" in document:
        found["quantized attention over fp32 SDPA"] = document["attention"]["ratio"]
    for case in document["cases"]:
        if case["threads"] == threads and case["batch"] == min(document["batches"]):
            found |= case["ratios"][PRESETS[0]]
    return found


def show(case: dict[str, Any]) -> None:
    print(f"\nbatch {case['batch']}, {case['threads']} thread(s), seconds by part:")
    print(" " * 22 + "".join(f"{name:>11}" for name in (*PARTS, "total")))
    for name, seconds in case["seconds"].items():
        cells = [*(seconds[p] for p in PARTS), whole(seconds)]
        print(f"  {name:20}" + "".join(f"{value:11.3f}" for value in cells))
    for preset, floor in case["floors"].items():
        shares = ", ".join(
            f"{name} {value:.3f} s, {value / case['seconds'][preset][name]:.0%} reached"
            for name, value in floor.items()
        )
        print(f"  floor of {preset}: {shares}")
    for preset, found in case["ratios"].items():
        for name, ratio in found.items():
            print(f"  {preset}: {name:40} {ratio:5.2f}x{_target(name)}")


def _target(name: str) -> str:
    if name not in TARGETS:
        return ""
    must, aim = TARGETS[name][column()]
    return f"   must {must}x, aim {aim}x"


def signature(quick: bool) -> dict[str, Any]:
    """What two runs must have in common to be one."""
    return {
        "isa": binding.isa(),
        "features": binding.features(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "quick": quick,
    }


def begun(path: Path | None, resume: bool, quick: bool) -> dict[str, Any]:
    """The document so far, of the same machine and settings, or a new one."""
    new: dict[str, Any] = {**signature(quick), "cases": []}
    if not (resume and path and path.exists()):
        return new
    document = json.loads(path.read_text())
    differs = [name for name, value in signature(quick).items() if document.get(name) != value]
    if differs:
        raise SystemExit(f"{path}: made with another {differs[0]}; leave --resume out")
    return document


def run(options: argparse.Namespace) -> dict[str, Any]:
    document = begun(options.json, options.resume, options.quick)
    document |= {"machine": options.machine, "batches": sorted(options.batches)}
    done = {(case["batch"], case["threads"]) for case in document["cases"]}
    words = ["--quick"] if options.quick else []
    presets = QUICK_PRESETS if options.quick else PRESETS

    def save() -> None:
        document["ratios"] = {f"threads {n}": table(document, n) for n in options.threads}
        document["targets"] = {
            name: dict(zip(("must", "aim"), both[column()], strict=True))
            for name, both in TARGETS.items()
        }
        if options.json:
            options.json.write_text(json.dumps(document, indent=1) + "\n")

    for count in options.threads:
        linears = document.setdefault("linears", {})
        if str(count) not in linears:
            linears[str(count)] = found_by("native_linear", *words, "--threads", str(count))
            save()
    for name, script, more in (
        ("attention", "native_attention", words),
        ("memory", "runtime_memory", words),
    ):
        if name not in document:
            document[name] = found_by(script, *more)
            save()
    pipe = build_model("var-d16")
    found = variants(pipe, presets, quick=options.quick)
    operations = decoder_operations(pipe)
    for batch in options.batches:
        for count in options.threads:
            if (batch, count) in done:
                continue
            torch.set_num_threads(count)
            rounds = 1 if options.quick or batch > 1 else 5
            case: dict[str, Any] = {"batch": batch, "threads": count}
            case["seconds"] = measure(found, batch, rounds)
            case["ratios"] = {p: ratios(case["seconds"], p) for p in presets}
            case["floors"] = floors(batch, count, operations, presets)
            show(case)
            document["cases"].append(case)
            save()
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batch 1, one thread, two presets")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path, help="write the result to this file, case by case")
    parser.add_argument("--resume", action="store_true", help="keep the cases the file has")
    parser.add_argument("--machine", default="", help="a word on the machine, for the report")
    options = parser.parse_args()
    if min(*options.threads, *options.batches) < 1:
        parser.error("--threads and --batches: expected numbers from 1")
    if binding.core() is None:
        raise SystemExit(binding.reason())
    if options.quick:
        options.threads, options.batches = [1], [1]
    usable = [n for n in options.threads if n <= binding.usable_threads(n)]
    for n in sorted(set(options.threads) - set(usable)):
        print(f"--threads {n}: left out, this process may use {binding.usable_threads(n)}")
    options.threads = usable
    print(
        f"native core: {binding.isa()} of {', '.join(binding.features())}; torch "
        f"{torch.__version__} on {torch.backends.cpu.get_cpu_capability()}, oneDNN capped at "
        f"{os.environ.get('ONEDNN_MAX_CPU_ISA', 'nothing')}; {torch.get_num_threads()} thread(s)"
    )
    document = run(options)
    print(f"\ntargets {'with' if column() else 'without'} AMX:")
    for name, found in document["ratios"].items():
        for ratio, value in found.items():
            print(f"  {name}: {ratio:40} {value:6.2f}x{_target(ratio)}")


if __name__ == "__main__":
    main()
