"""Convolutions of the native core against float32 and bfloat16 ones, at the shapes of the decoder
of VAR-d16, and the whole decoder on them.

    python -m benchmarks.speed.native_convolution [--quick] [--decoder] [--isa NAME] [--json FILE]
    python -m benchmarks.speed.native_convolution --report      # its section of docs/benchmarks.md

A layer is what a ResNet block has of it: GroupNorm and SiLU, the convolution, the sum with the
shortcut. The floats are oneDNN's, channels last, the fastest torch offers. Ours has the codes of
the norm from moments that the convolution before found, and finds those of its own result. All
variants alternate in one process on one thread, and medians of CPU time are compared, so a busy
machine slows them alike. The floor is the time of the products at the measured peak of the
instruction.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import RESULTS
from benchmarks.common.timing import alternate
from varptq.models.convolutions import NORM_EPS, NORM_GROUPS
from varptq.models.pipeline import build_model
from varptq.models.var.vqvae import VQVAE
from varptq.native import binding
from varptq.native import convolution as native
from varptq.native.room import Room
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert_autoencoder
from varptq.runtime.convolutions import decode_on
from varptq.runtime.cpu import NativeKernels

FOUND = RESULTS / "native_convolution.json"
PAGE = DOCS / "benchmarks.md"
MUST, AIM = 3.0, 4.0


class Shape(NamedTuple):
    """A 3x3 convolution: channels in and out, side of the input."""

    inputs: int
    outputs: int
    side: int
    upsample: bool = False


SHAPES = (
    Shape(160, 160, 256),
    Shape(160, 160, 128, upsample=True),
    Shape(320, 160, 128),
    Shape(320, 320, 64),
    Shape(640, 640, 16),
)
QUICK_SHAPES = SHAPES[::3]


def layer_calls(shape: Shape) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    inputs, outputs, side, upsample = shape
    out_side = side * (1 + upsample)
    x = torch.randn(1, side, side, inputs, generator=g)
    skip = torch.randn(1, out_side, out_side, outputs, generator=g)
    gain, shift = torch.ones(inputs), torch.zeros(inputs)
    bias = torch.randn(outputs, generator=g)
    codes = torch.randint(-127, 128, (outputs, inputs, 3, 3), generator=g).to(torch.int8)
    weight = native.pack(codes, torch.full((outputs,), 0.01))
    wide = x.double()
    sums = torch.stack((wide.sum((1, 2)), (wide * wide).sum((1, 2))))
    known = native.Moments(sums, torch.stack((x.amin((1, 2)), x.amax((1, 2)))))
    norm, room = native.Norm(NORM_GROUPS, gain, shift, NORM_EPS), Room()
    # An upsampling has neither norm nor shortcut.
    plain = {"norm": None} if upsample else {"norm": norm, "silu": True}

    def ours() -> Tensor:
        found = native.map_codes(x, **plain, moments=known, room=room)
        more = {"moments": native.new_moments(1, outputs), "room": room, "upsample": upsample}
        added = None if upsample else skip
        around = (1, 1, 1, 1)
        return native.convolution(found, weight, bias, padding=around, residual=added, **more)

    def floats(dtype: torch.dtype) -> Callable[[], Tensor]:
        x_NCHW, skip_NCHW = (t.permute(0, 3, 1, 2).to(dtype) for t in (x, skip))
        kernel = codes.to(dtype).to(memory_format=torch.channels_last)
        a, b, c = gain.to(dtype), shift.to(dtype), bias.to(dtype)

        def call() -> Tensor:
            if upsample:
                nearest = F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest")
                return F.conv2d(nearest, kernel, c, padding=1)
            h = F.silu(F.group_norm(x_NCHW, NORM_GROUPS, a, b, NORM_EPS), inplace=True)
            return skip_NCHW + F.conv2d(h, kernel, c, padding=1)

        return call

    return {"float32": floats(torch.float32), "bfloat16": floats(torch.bfloat16), "int8": ours}


def decoders() -> dict[str, VQVAE]:
    """The d16 VQVAE with random weights: float32 and bfloat16 in its decoding parts, and int8."""
    pipe = build_model("var-d16")
    plain = pipe.vae
    assert isinstance(plain, VQVAE)
    quantized = convert_autoencoder(plain, QuantConfig.preset("w8a8"))
    decode_on(quantized, NativeKernels())
    half = copy.deepcopy(plain)
    for name in plain.DECODING:
        half.get_submodule(name).bfloat16()
    found = {"float32": plain, "bfloat16": half, "int8": quantized}
    for vae in found.values():
        for name in vae.DECODING:
            part: nn.Module = vae.get_submodule(name)
            part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return found  # pyright: ignore[reportReturnType]


def measure(quick: bool) -> dict[str, Any]:
    peak = binding.peak_gops() * 1e9
    rows: list[dict[str, Any]] = []
    budget = 1.0 if quick else 3.0
    for shape in QUICK_SHAPES if quick else SHAPES:
        seconds = alternate(layer_calls(shape), budget, 1)
        out_side = shape.side * (1 + shape.upsample)
        operations = 2 * 9 * shape.inputs * shape.outputs * out_side**2
        rows.append({**shape._asdict(), "seconds": seconds, "operations": operations})
        print(shape, {name: f"{s * 1e3:.2f} ms" for name, s in seconds.items()}, flush=True)
    return {"isa": binding.isa(), "peak": peak, "layers": rows, "decoder": decoder(budget)}


def decoder(budget: float) -> dict[str, Any]:
    """Seconds and operations of the whole decoder."""
    networks = decoders()
    z = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(1))
    calls = {name: lambda vae=vae: vae.decode_features(z) for name, vae in networks.items()}
    with FlopCounterMode(display=False) as counter:
        calls["float32"]()
    seconds = alternate(calls, 5 * budget, 1)
    print("decoder", {name: f"{s:.3f} s" for name, s in seconds.items()})
    return {"seconds": seconds, "operations": counter.get_total_flops()}


def cells(case: dict[str, Any], peak: float, digits: int, unit: float) -> list[str]:
    taken = case["seconds"]
    ours = taken["int8"]
    floor = f"{case['operations'] / peak / ours:.0%}" if peak else ""
    return [
        *(f"{taken[name] * unit:.{digits}f}" for name in ("float32", "bfloat16", "int8")),
        *(f"{taken[name] / ours:.2f}x" for name in ("float32", "bfloat16")),
        floor,
    ]


def report(document: dict[str, Any]) -> None:
    head = ["float32", "bfloat16", "int8", "over float32", "over bfloat16", "of the floor"]
    rows = []
    for case in document["layers"]:
        name = f"{case['inputs']} to {case['outputs']}, {case['side']}"
        name += ", upsampled" if case["upsample"] else ""
        rows.append([name, *cells(case, document["peak"], 1, 1e3)])
    lines = [
        f"Native core on {document['isa']}, {document['peak'] / 1e9:.0f} Gop/s at the peak, one "
        f"thread. The decoder over float32: must {MUST:.0f}x, aim {AIM:.0f}x.",
        "",
        *table(["channels and side, ms", *head], rows),
        *table(
            ["seconds", *head],
            [["whole decoder", *cells(document["decoder"], document["peak"], 2, 1.0)]],
        ),
    ]
    replace(PAGE, "native convolution", lines[:-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers and few repeats")
    parser.add_argument("--decoder", action="store_true", help="again, the layers from the file")
    parser.add_argument("--isa", help="instruction set of the native core, if not the best")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--report", action="store_true", help="only write docs/benchmarks.md")
    options = parser.parse_args()
    if options.report:
        report(json.loads((options.json or FOUND).read_text()))
        return 0
    if binding.core() is None:
        print(binding.reason(), file=sys.stderr)
        return 2
    if options.isa and not binding.select_isa(options.isa):
        known = ", ".join(binding.features())
        print(f"--isa {options.isa} cannot run here, expected one of {known}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.decoder:
            document = json.loads((options.json or FOUND).read_text())
            document["decoder"] = decoder(1.0)
        else:
            document = measure(options.quick)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
