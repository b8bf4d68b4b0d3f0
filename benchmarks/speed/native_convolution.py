"""Convolutions of the native core against float32 ones, and bfloat16 ones where the CPU has them,
at the shapes of the decoder of VAR-d16, and the whole decoder on them.

    python -m benchmarks.speed.native_convolution [--quick] [--decoder] [--isa NAME] [--json FILE]
                                                  [--machine "a word on the CPU"]
    python -m benchmarks.speed.native_convolution --report      # its section of docs/benchmarks.md

A layer is what a ResNet block has of it: GroupNorm and SiLU, the convolution, the sum with the
shortcut. The floats are oneDNN's, channels last, the fastest torch offers. Ours has the codes of
the norm from moments that the convolution before found, and finds those of its own result. All
variants alternate in one process on one thread, and medians of CPU time are compared, so a busy
machine slows them alike. The last column is the time of all products at the measured peak of the
byte product, as a share of ours: above 100% where kernels multiply less. The decoder stands beside
OpenVINO's in 8 bits where openvino and nncf are installed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common.bfloat16 import has_bfloat16
from benchmarks.common.openvino_decoder import openvino_decoder
from benchmarks.common.pages import DOCS, replace, table
from benchmarks.common.results import read_document
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

# Results of a class of CPU each.
CLASSES = ("native_convolution", "native_convolution_ice_lake")
PAGE = DOCS / "benchmarks.md"
MUST, AIM = 3.0, 4.0
OTHERS = ("float32", "bfloat16", "OpenVINO int8")


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

    found: dict[str, Callable[[], object]] = {"float32": floats(torch.float32), "int8": ours}
    if has_bfloat16():
        found["bfloat16"] = floats(torch.bfloat16)
    return found


def decoders() -> dict[str, VQVAE]:
    """The d16 VQVAE with random weights: int8, and its decoding parts in float32 and bfloat16."""
    pipe = build_model("var-d16")
    plain = pipe.vae
    assert isinstance(plain, VQVAE)
    quantized = convert_autoencoder(plain, QuantConfig.preset("w8a8"))
    decode_on(quantized, NativeKernels())
    found = {"float32": plain, "int8": quantized}
    if has_bfloat16():
        found["bfloat16"] = copy.deepcopy(plain)
        for name in plain.DECODING:
            found["bfloat16"].get_submodule(name).bfloat16()
    for vae in found.values():
        for name in vae.DECODING:
            part: nn.Module = vae.get_submodule(name)
            part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return found


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
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(vae.decode_features, z) for name, vae in networks.items()
    }
    with FlopCounterMode(display=False) as counter:
        calls["float32"]()
    other = openvino_decoder(networks["float32"], z)
    if isinstance(other, str):
        print(f"without OpenVINO: {other}")
    else:
        calls["OpenVINO int8"] = other
    seconds = alternate(calls, 5 * budget, 1)
    print("decoder", {name: f"{s:.3f} s" for name, s in seconds.items()})
    return {"seconds": seconds, "operations": counter.get_total_flops()}


def cases(label: str, named: dict[str, Any], peak: float, digits: int, unit: float) -> list[str]:
    """A table of `named` cases, which were measured beside the same others."""
    others = [name for name in OTHERS if name in next(iter(named.values()))["seconds"]]
    rows = []
    for name, case in named.items():
        taken = case["seconds"]
        ours = taken["int8"]
        cells = [f"{taken[other] * unit:.{digits}f}" for other in (*others, "int8")]
        cells += [f"{taken[other] / ours:.2f}x" for other in others]
        share = f"{case['operations'] / peak / ours:.0%}" if peak else ""
        rows.append([name, *cells, share])
    return table(
        [label, *others, "int8", *(f"over {name}" for name in others), "all products at the peak"],
        rows,
    )


def section(document: dict[str, Any]) -> list[str]:
    """Of one class of CPU."""
    layers = {}
    for case in document["layers"]:
        name = f"{case['inputs']} to {case['outputs']}, {case['side']}"
        layers[name + (", upsampled" if case["upsample"] else "")] = case
    peak = document["peak"]
    return [
        f"**{document['machine']}**: native core on {document['isa']}, {peak / 1e9:.0f} Gop/s at "
        f"the peak, one thread. The decoder over float32: must {MUST:.0f}x, aim {AIM:.0f}x.",
        "",
        *cases("channels and side, ms", layers, peak, 1, 1e3),
        *cases("seconds", {"whole decoder": document["decoder"]}, peak, 2, 1.0),
    ]


def report(documents: list[dict[str, Any]]) -> None:
    lines = [line for document in documents for line in section(document)]
    replace(PAGE, "native convolution", lines[:-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers and few repeats")
    parser.add_argument("--decoder", action="store_true", help="again, the layers from the file")
    parser.add_argument("--isa", help="instruction set of the native core, if not the best")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--machine", default="", help="a word on the CPU, for the report")
    parser.add_argument("--report", action="store_true", help="only write docs/benchmarks.md")
    options = parser.parse_args()
    if options.report:
        report([read_document(name) for name in CLASSES])
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
            if options.json is None:
                parser.error("--decoder: expected --json with the file of the layers")
            document = json.loads(options.json.read_text())
            document["decoder"] = decoder(1.0)
        else:
            document = measure(options.quick) | {"machine": options.machine}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
