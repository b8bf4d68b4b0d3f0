"""An image from a text on the CPU: Infinity in float and on our integers, side by side.

    python -m benchmarks.speed.infinity_cpu [--quick] [--depth 8] [--size 0.06M] [--threads 1]
                                            [--rounds 5] [--json FILE] [--machine TEXT]
    python -m benchmarks.speed.infinity_cpu --report

The shapes of Infinity-2B with random weights and fewer blocks, so that the float model fits beside
ours; one guided image of a text of 24 tokens. One process, variants in turn, medians after a
warm-up; with one thread the clock is CPU time. Float is our eager model in float32 and in bfloat16.
Ours are nearest rounding, whose time is that of any rounding, with the image decoder in bfloat16,
channels last. Time is that of the loop over scales (`transformer`, with sampling and the pyramid of
bits) and of the image decoder; both are the whole image. The transformer's is given by parts, too
(common/runtime_variants.py); `rest` has the pyramid.

Peak memory is the kernel's high-water mark of a fresh process that loads one variant and draws one
image; a float variant makes its random weights, ours are loaded from an artifact. --no-peaks leaves
it out. --quick: two blocks, two presets, one round. --report: only write docs/benchmarks.md, from
the files of results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import varptq
from benchmarks.common import few_blocks
from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import read_document, read_lines
from benchmarks.common.runtime_variants import Stopwatch, integers, simulated
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts

NAME = "benchmarks.speed.infinity_cpu"
MODEL, TEXT_TOKENS = "infinity-2b", 24
PRESETS, QUICK_PRESETS = ("w8a8", "w4a8", "w4a4"), ("w8a8", "w4a4")
FLOATS = {"eager fp32": torch.float32, "eager bf16": torch.bfloat16}
# Of the transformer, then the decoder.
PARTS = ("linears", "attention", "text", "sampling", "rest", "decoder")
TRANSFORMER = PARTS[:-1]
PAGE = DOCS / "benchmarks.md"
# Files of results, in the order of the page.
FOUND = ("infinity_cpu",)
GB = 1e9
Seconds = dict[str, float]


def build(depth: int, size: str, dtype: torch.dtype) -> Pipeline:
    """The preset with `depth` blocks, for images of `size`."""
    return few_blocks.build(MODEL, depth, dtype).sized(size)


def prompt(pipe: Pipeline) -> Prompts:
    shape = (TEXT_TOKENS, pipe.var.arch.text_channels)
    return pipe.prompts([torch.randn(shape, generator=torch.Generator().manual_seed(0))])


def in_dtype(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """The same values in another dtype; `pipe` stays as it is."""
    made = build(pipe.var.arch.depth, "0.06M", dtype).over(pipe.scales)
    for mine, theirs in ((made.var, pipe.var), (made.vae, pipe.vae)):
        mine.load_state_dict(theirs.state_dict())
    return made


def variant(pipe: Pipeline) -> Callable[[], Seconds]:
    """One image; seconds by part."""
    inner, asked, watch = pipe.vae.decode_features, prompt(pipe), Stopwatch()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    watch.clock = clock

    def decode(features: torch.Tensor) -> torch.Tensor:
        started = clock()
        image = inner(features)
        watch.seconds["decoder"] = clock() - started
        return image

    watch.watch(pipe)
    pipe.vae.decode_features = decode

    def run() -> Seconds:
        watch.seconds.clear()
        started = clock()
        varptq.generate(pipe, asked, seed=0)
        whole, found = clock() - started, watch.seconds
        found["rest"] = whole - sum(found.values())
        return {part: found[part] for part in PARTS}

    return run


def measure(options: argparse.Namespace, presets: tuple[str, ...]) -> dict[str, Seconds]:
    """Median seconds by variant and part."""
    wide = build(options.depth, options.size, torch.float32)
    # Before the float variant's decoder is watched: deep copies are made of it.
    found: dict[str, Callable[[], Seconds]] = {}
    for preset in presets:
        found[preset] = variant(integers(wide, preset, torch.bfloat16))
    found["eager bf16"] = variant(in_dtype(wide, torch.bfloat16))
    found["eager fp32"] = variant(wide)
    times: dict[str, list[Seconds]] = {name: [] for name in found}
    for number in range(options.rounds + 1):
        for name, run in found.items():
            taken = run()
            if number:
                times[name].append(taken)
    return {
        name: {part: statistics.median(t[part] for t in taken) for part in PARTS}
        for name, taken in times.items()
    }


def peak() -> int:
    """Bytes. Not getrusage's, which a process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say a process's peak memory")


def child(options: argparse.Namespace) -> None:
    """Load one variant and draw; its name and the folder of its artifact are in `options`."""
    torch.set_num_threads(1)
    name, folder = options.child
    if name in FLOATS:
        pipe = build(options.depth, options.size, FLOATS[name])
    else:
        pipe = varptq.load(folder, runtime="cpu", dtype=torch.bfloat16)
    loaded = peak()
    varptq.generate(pipe, prompt(pipe), seed=0)
    print(json.dumps({"loaded": loaded, "one image": peak()}))


def memory(options: argparse.Namespace, presets: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Peak bytes of a process by variant, after loading and after an image."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        wide = build(options.depth, options.size, torch.float32)
        for preset in presets:
            varptq.save(simulated(wide, preset), f"{folder}/{preset}")
        del wide
        for name in (*FLOATS, *presets):
            command = [sys.executable, "-m", NAME, "--child", name, f"{folder}/{name}"]
            command += ["--depth", str(options.depth), "--size", options.size]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout)
    return found


def transformer(own: Seconds) -> float:
    return sum(own[part] for part in TRANSFORMER)


def report(times: dict[str, Seconds], peaks: dict[str, dict[str, int]]) -> list[str]:
    """Tables: seconds, how many times faster than each float variant, and the peak where it was
    measured; the parts."""
    bases, over = [times[name] for name in FLOATS], " / ".join(FLOATS)
    head = ["", "transformer s", "whole image s", f"transformer over {over}"]
    head += ["whole over the same", *(["peak GB loaded", "with an image"] if peaks else [])]
    rows: list[list[str]] = []
    for name, own in times.items():
        whole = sum(own.values())
        ratios = [
            " / ".join(f"{value:.2f}" for value in row)
            for row in (
                [transformer(base) / transformer(own) for base in bases],
                [sum(base.values()) / whole for base in bases],
            )
        ]
        sizes = [f"{size / GB:.2f}" for size in peaks.get(name, {}).values()]
        rows.append([name, f"{transformer(own):.2f}", f"{whole:.2f}", *ratios, *sizes])
    parts = [[name, *(f"{own[part]:.2f}" for part in PARTS)] for name, own in times.items()]
    return [*table(head, rows), *table(["seconds", *PARTS], parts)]


def quantizing() -> list[str]:
    """A table of results/streamed.jsonl: what quantizing block by block took."""
    head = [
        "model",
        "blocks",
        "config, method",
        "images, dtype",
        "resident",
        "without pages of files",
    ]
    rows = [
        [
            x["model"],
            str(x["blocks"]),
            f"{x['config']}, {x['method']}",
            f"{x['samples']}, {x.get('dtype', 'float32')}",
            *(f"{x['quantize'][kind] / GB:.2f}" for kind in ("resident", "anonymous")),
        ]
        for x in read_lines("streamed")
        if "quantize" in x
    ]
    return table(head, rows)


def drawing() -> list[str]:
    """A table of results/streamed.jsonl: what loading an artifact and drawing took."""
    head = ["model", "blocks", "config", "size", "loaded", "with an image", "seconds", "CPU"]
    rows = [
        [
            x["model"],
            f"{x['blocks']}{', all alike' if x.get('repeated') else ''}",
            x["config"],
            x.get("size", "0.06M"),
            *(f"{x['peaks'][when] / GB:.2f}" for when in ("loaded", "one image")),
            f"{x['seconds']['image']:.0f}" if "machine" in x else "-",
            x.get("machine", "-"),
        ]
        for x in read_lines("streamed")
        if "peaks" in x
    ]
    return table(head, rows)


def write_page() -> None:
    """The section of docs/benchmarks.md, of all that was measured."""
    lines = [""]
    for document in map(read_document, FOUND):
        depth, size, rounds = (document[key] for key in ("depth", "size", "rounds"))
        lines += [
            f"**{size}, {depth} of 32 blocks of {MODEL}, {document['threads']} thread(s)**, "
            f"{document['machine']}; medians of {rounds}:",
            "",
            *report(document["seconds"], document["peak bytes"]),
        ]
    lines += ["**Quantizing block by block**, peak GB of the process:", "", *quantizing()]
    lines += ["**An image from an artifact**, peak GB of a fresh process, one thread:", ""]
    replace(PAGE, "infinity", [*lines, *drawing()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two blocks, two presets, one round")
    parser.add_argument("--depth", type=int, default=8, help="blocks, of 32")
    parser.add_argument("--size", default="0.06M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--machine", default="", help="what CPU this is, for the page")
    parser.add_argument("--no-peaks", action="store_true", help="leave peak memory out")
    parser.add_argument("--report", action="store_true", help="only write docs/benchmarks.md")
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if options.report:
        write_page()
        return
    if options.quick:
        options.depth, options.rounds = 2, 1
    torch.set_num_threads(options.threads)
    presets = QUICK_PRESETS if options.quick else PRESETS
    times = measure(options, presets)
    peaks = {} if options.no_peaks else memory(options, presets)
    print("\n".join(report(times, peaks)))
    if options.json:
        facts = {key: getattr(options, key) for key in ("machine", "depth", "size", "threads")}
        document = {**facts, "rounds": options.rounds, "seconds": times, "peak bytes": peaks}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
