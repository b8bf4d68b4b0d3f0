"""Peak memory of a process that loads an artifact and makes one image, and of one that makes it.

    python -m benchmarks.speed.runtime_memory [--quick] [--json FILE]
    python -m benchmarks.speed.runtime_memory --streamed infinity-8b [--blocks 2] [--method rtn]
                                              [--config w4a8] [--samples 8] [--dtype float32]
                                              [--files FOLDER] [--out FOLDER]
    python -m benchmarks.speed.runtime_memory --repeated infinity-8b [--config w4a8] [--size 0.25M]

Saves VAR-d16 with random weights at W8A8, W4A8 and W4A4, and loads each in a fresh process on the
runtime cpu. The peak is the kernel's high-water mark of resident memory, mapped pages of the file
and of the libraries included. --quick: W8A8 alone.

--streamed: `varptq quantize` of a preset from random bfloat16 shards on disk, block by block, with
images of --size of random features; then a fresh process that loads the artifact and draws one
image of it on one thread, the decoder in bfloat16. That last part is not for configs that the
runtime cpu refuses, such as w4a8+paper, which draws no calibration images. --blocks: with so many
blocks of the model's. --files: where the shards are, or are written to. --out: where the artifact
stays. Seconds are of the clock, so they say little on a busy machine.

--repeated: the image alone, from an artifact of all blocks whose tensors are those of one block, so
that nothing has to be quantized that memory does not depend on.

Lines go to benchmarks/results/streamed.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.linear_shapes import MOST_BYTES

NAME = "benchmarks.speed.runtime_memory"
GB = 1e9
TEXT_TOKENS = 24
POLL_SECONDS = 0.2


def status(process: int | str, name: str) -> int:
    """Bytes of a line of a process's status. Its peak is not getrusage's, which a process inherits
    from the one that started it."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not say {name} of a process")


def peak() -> int:
    return status("self", "VmHWM")


def child(folder: str, dtype: str, size: str) -> None:
    import torch

    import varptq

    torch.set_num_threads(1)
    peaks, start = {"imports": peak()}, time.monotonic()
    pipe = varptq.load(folder, runtime="cpu", dtype=getattr(torch, dtype))
    peaks["loaded"], loaded = peak(), time.monotonic()
    if pipe.var.READS_TEXTS:
        varptq.generate(pipe.sized(size), texts(1, pipe.var.arch.text_channels), seed=0)
    else:
        varptq.generate(pipe, [207], seed=0)
    peaks["one image"] = peak()
    seconds = {"load": loaded - start, "image": time.monotonic() - loaded}
    print(json.dumps({"peaks": peaks, "seconds": seconds}))


def texts(count: int, channels: int) -> list[Any]:
    """Features of as many texts."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TEXT_TOKENS, channels, generator=generator) for _ in range(count)]


def image(folder: str | Path, dtype: str, size: str = "") -> dict[str, Any]:
    """What `child` says of the artifact in a fresh process. size: where the model has several."""
    command = [sys.executable, "-m", NAME, "--child", str(folder), dtype, size]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def watched(command: list[str]) -> dict[str, float]:
    """Peaks and seconds of a process: resident, and that without pages of files, looked at a few
    times a second."""
    start, anonymous, resident = time.monotonic(), 0, 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                anonymous = max(anonymous, status(process.pid, "RssAnon"))
                resident = status(process.pid, "VmHWM")
            except (OSError, SystemExit):
                # It has just ended.
                continue
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    seconds = time.monotonic() - start
    return {"resident": resident, "anonymous": anonymous, "seconds": seconds}


def streamed(options: argparse.Namespace) -> None:
    """One run of `varptq quantize` on shards, and an image of what it made."""
    import varptq
    from varptq.models.presets import preset
    from varptq.models.random_files import AUTOENCODER_NAME, INDEX_NAME, write_random
    from varptq.models.texts import TextPrompts

    model = preset(options.streamed)
    depth = options.blocks or model.transformer_arch.depth
    arch = dataclasses.replace(model.transformer_arch, depth=depth)
    with tempfile.TemporaryDirectory(dir=options.files and options.files.parent) as work:
        files = options.files or Path(work) / "files"
        var, vae = files / "transformer" / INDEX_NAME, files / AUTOENCODER_NAME
        if not var.exists():
            write_random(dataclasses.replace(model, transformer_arch=arch), files)
        prompts, out = Path(work) / "prompts.safetensors", options.out or Path(work) / "artifact"
        varptq.save_features(prompts, TextPrompts.of(texts(options.samples, arch.text_channels)))
        named = {
            "--var": var,
            "--vae": vae,
            "--prompts": prompts,
            "--out": out,
            "--size": options.size,
        }
        named |= {"--method": options.method, "--config": options.config, "--memory": "2GB"}
        named |= {"--samples": options.samples, "--dtype": options.dtype}
        words = [str(word) for pair in named.items() for word in pair]
        line: dict[str, Any] = {"model": model.name, "blocks": depth, "method": options.method}
        line |= {"config": options.config, "samples": options.samples, "dtype": options.dtype}
        line["size"] = options.size
        line["quantize"] = watched([sys.executable, "-m", "varptq", "quantize", *words])
        line["artifact"] = (out / "model.safetensors").stat().st_size
        told(line)
        # A config that the runtime cpu cannot execute ends here.
        same = {key: line[key] for key in ("model", "blocks", "config", "size")}
        told(same | image(out, "bfloat16", options.size))


def repeated(options: argparse.Namespace) -> None:
    """An image of an artifact as large as the published model's."""
    from benchmarks.common.few_blocks import save_repeated

    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "artifact"
        depth = save_repeated(options.repeated, options.size, options.config, out)
        line: dict[str, Any] = {"model": options.repeated, "blocks": depth, "repeated": True}
        line |= {"config": options.config, "artifact": (out / "model.safetensors").stat().st_size}
        line |= {"size": options.size, "machine": options.machine}
        told(line | image(out, "bfloat16", options.size))


def told(line: dict[str, Any]) -> None:
    from benchmarks.common.results import append_line

    print(json.dumps(line), flush=True)
    append_line("streamed", line)


def measure(presets: tuple[str, ...]) -> list[dict[str, Any]]:
    from benchmarks.common.runtime_variants import simulated
    from varptq.artifact import save
    from varptq.models.pipeline import build_model

    pipe, found = build_model("var-d16"), []
    for preset in presets:
        with tempfile.TemporaryDirectory() as folder:
            save(simulated(pipe, preset), folder, force=True)
            found.append({"preset": preset, **image(folder, "float32")})
            show(found[-1])
    return found


def show(case: dict[str, Any]) -> None:
    peaks = ", ".join(f"{name} {value / GB:.2f}" for name, value in case["peaks"].items())
    most = MOST_BYTES[case["preset"]]
    held = case["peaks"]["one image"] <= most
    print(
        f"{case['preset']}: loaded in {case['seconds']['load']:.1f} s; peak GB {peaks}; must "
        f"{most / GB} {'held' if held else 'MISSED'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one artifact")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--streamed", metavar="MODEL", help="quantize a preset block by block")
    parser.add_argument("--repeated", metavar="MODEL", help="an image of one block over and over")
    parser.add_argument("--blocks", type=int, help="how many blocks it has; default: all")
    parser.add_argument("--method", default="rtn", help="rtn or gptq")
    parser.add_argument("--config", default="w4a8", help="name of a config")
    parser.add_argument("--samples", type=int, default=8, help="calibration images")
    parser.add_argument("--dtype", default="float32", help="in what blocks compute")
    parser.add_argument("--machine", default=platform.machine(), help="words for the page")
    parser.add_argument("--size", default="0.06M", help="of images")
    parser.add_argument("--files", type=Path, help="folder of the shards")
    parser.add_argument("--out", type=Path, help="folder of the artifact, which is kept")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    if options.streamed:
        streamed(options)
        return
    if options.repeated:
        repeated(options)
        return
    found = measure(("w8a8",) if options.quick else tuple(MOST_BYTES))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
