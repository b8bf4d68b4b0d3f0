"""What int8 convolutions in the image decoder would cost, and gain: an experiment.

    python -m benchmarks.speed.int8_decoder [--quick] [--lpips FILE] [--json FILE]
    python -m benchmarks.speed.int8_decoder --report        # its section of docs/benchmarks.md

Cost: the demo decoder on the float model's own tokens, with every convolution's weight in 8 bits
per output channel and its input in 8 bits per image, range taken anew for every image (dynamic), as
`quant.affine` rounds; PSNR and LPIPS to the float32 decoder's images, beside those of bf16. The
first and last convolution may stay in float. Gain: oneDNN's u8 x s8 convolution through torch at
the shapes of the d16 decoder, alone and with the quantization of its input in plain torch, against
its bf16 convolution, channels last.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import varptq
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import RESULTS
from varptq.evaluate.networks.lpips import Lpips
from varptq.evaluate.paired import psnr
from varptq.models.var.vqvae import VQVAE
from varptq.pictures import to_pixels
from varptq.quant.affine import affine_codes, affine_fake, affine_grid

FOUND = RESULTS / "int8_decoder.json"
PAGE = DOCS / "benchmarks.md"
# Channels in and out and side of the 3x3 convolutions that do most of the d16 decoder's work.
SHAPES = ((160, 160, 256), (320, 320, 128), (320, 320, 64), (640, 640, 16))
PER_IMAGE = (1, 2, 3)


class Int8Conv(nn.Module):
    """A Conv2d on fake-quantized weight and input."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        conv.weight.data = affine_fake(conv.weight.data, 8, PER_IMAGE)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.conv(affine_fake(x_BCSS, 8, PER_IMAGE))


def int8(vae: VQVAE, *, ends: bool) -> VQVAE:
    """A copy with int8 convolutions; `ends`: conv_in and conv_out too."""
    made = copy.deepcopy(vae)
    for name, module in list(made.decoder.named_modules()):
        if isinstance(module, nn.Conv2d) and (ends or name not in ("conv_in", "conv_out")):
            parent, _, child = name.rpartition(".")
            setattr(made.decoder.get_submodule(parent), child, Int8Conv(module))
    return made


def pixels(vae: VQVAE, tokens: Tensor) -> np.ndarray:
    """(B, S, S, 3) uint8."""
    with torch.inference_mode():
        images = torch.cat([vae.decode(part).float() for part in tokens.split(16)])
    return to_pixels((images + 1) / 2)


def quality(count: int, lpips: Path | None) -> dict[str, dict[str, float]]:
    pipe = varptq.load_model("demo")
    labels = [i % len(pipe.class_names) for i in range(count)]
    tokens = varptq.generate(pipe, labels, seed=11, decode=False).tokens
    half = copy.deepcopy(pipe.vae)
    half.decoder.to(torch.bfloat16), half.post_quant_conv.to(torch.bfloat16)
    judge = Lpips.load(lpips) if lpips else None
    exact, found = pixels(pipe.vae, tokens), {}
    for name, vae in (
        ("bf16", half),
        ("int8, first and last float", int8(pipe.vae, ends=False)),
        ("int8, all", int8(pipe.vae, ends=True)),
    ):
        other = pixels(vae, tokens)
        found[name] = {"psnr": psnr(exact, other)}
        if judge:
            pair = torch.from_numpy(exact), torch.from_numpy(other)
            found[name]["lpips"] = float(judge(*pair).mean())
    return found


def fastest(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return statistics.median(times)


def speed(channels: int, outputs: int, side: int, repeats: int) -> dict[str, Any]:
    """Seconds of one convolution on one thread."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=g).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, generator=g)
    bias, ones = torch.zeros(outputs), torch.ones(outputs)
    half = weight.bfloat16().to(memory_format=torch.channels_last)
    x_half = x.bfloat16()
    codes = (weight * 20).round().clamp(-128, 127).to(torch.int8)
    windows = (1, 1), (1, 1), (1, 1)
    ops = torch.ops.onednn
    packed = ops.qconv_prepack(codes, ones, 1.0, 0, *map(list, windows), 1, list(x.shape))
    zeros = torch.zeros(outputs, dtype=torch.int32)

    def product(u8: Tensor, scale: float, zero_point: int) -> Tensor:
        options = (bias, *map(list, windows), 1, 1.0, 0, torch.bfloat16, "none", [], "")
        return ops.qconv2d_pointwise(u8, scale, zero_point, packed, ones, zeros, *options)

    def quantized() -> Tensor:
        grid = affine_grid(x_half, 8, (0, 1, 2, 3))
        u8 = affine_codes(x_half, grid, 8).to(torch.uint8)
        return product(u8, float(grid.scale), int(grid.zero_point))

    u8 = (x * 20 + 100).clamp(0, 255).to(torch.uint8)
    calls = {
        "bf16": lambda: F.conv2d(x_half, half, bias.bfloat16(), padding=1),
        "int8 alone": lambda: product(u8, 1.0, 100),
        "int8 with quantization": quantized,
    }
    seconds = {name: fastest(call, repeats) for name, call in calls.items()}
    return {"channels": channels, "outputs": outputs, "side": side, "seconds": seconds}


def report(document: dict[str, Any]) -> None:
    lines = [
        f"{document['images']} images of the demo model, to the float32 decoder:",
        "",
        "| decoder | PSNR, dB | LPIPS |",
        "|---|---|---|",
    ]
    for name, found in document["quality"].items():
        lpips = f"{found['lpips']:.4f}" if "lpips" in found else ""
        lines.append(f"| {name} | {found['psnr']:.1f} | {lpips} |")
    lines += ["", "One 3x3 convolution of the d16 decoder, one thread, ms:", ""]
    lines += [
        "| channels, side | bf16 | int8 alone | int8 with quantization |",
        "|---|---|---|---|",
    ]
    for case in document["speed"]:
        taken = case["seconds"]
        cells = [f"{taken['bf16'] * 1e3:.1f}"]
        for name in ("int8 alone", "int8 with quantization"):
            cells.append(f"{taken[name] * 1e3:.1f} ({taken['bf16'] / taken[name]:.2f}x)")
        lines.append(f"| {case['channels']}, {case['side']} | " + " | ".join(cells) + " |")
    replace(PAGE, "int8 decoder", lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images and repeats")
    parser.add_argument("--lpips", type=Path, help="AlexNet with the LPIPS heads, .safetensors")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--report", action="store_true", help="only write docs/benchmarks.md")
    options = parser.parse_args()
    if options.report:
        report(json.loads((options.json or FOUND).read_text()))
        return
    torch.set_num_threads(1)
    count, repeats = (8, 2) if options.quick else (200, 7)
    document: dict[str, Any] = {"images": count, "quality": quality(count, options.lpips)}
    for name, found in document["quality"].items():
        print(name, ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
    document["speed"] = [speed(*shape, repeats) for shape in SHAPES]
    for case in document["speed"]:
        ms = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in case["seconds"].items())
        print(f"{case['channels']} channels, {case['side']} x {case['side']}: ms {ms}")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
