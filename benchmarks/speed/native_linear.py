"""Integer Linear layers of the native core against prepacked float32, and bfloat16 where the CPU
has it, at the shapes of VAR-d16.

    python -m benchmarks.speed.native_linear [--quick] [--threads N] [--isa NAME] [--json FILE]
    python -m benchmarks.speed.native_linear --sets FILE      # every instruction set in turn
    python -m benchmarks.speed.native_linear --report         # from those, docs/tables/runtime.md

Quantization of the input is included; the floats are oneDNN's with weights packed beforehand, the
best torch offers. All variants of a shape alternate in one process and medians are compared, so a
busy machine slows them alike; with one thread the clock is the thread's own CPU time. "image" adds
up one 256 px image: the rows of the ten scales with guidance (M = 2 .. 512), 16 blocks, ada_lin
once and the head. Next to each the share of the floor that is reached: the time of the product's
operations at the measured peak of the instruction, or of the weight's bytes at the measured rate of
reading memory, whichever is longer.

--sets shows what CPUs of other classes would do, as far as this one can: each set in a process of
its own, with --quick, and the floats capped at the same class. "avxvnni-evex" is AVX-VNNI's kernel
in the encoding that AVX512 has for its instruction.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.bfloat16 import has_bfloat16
from benchmarks.common.linear_shapes import DEPTH, LAYERS, ROWS, SCHEMES
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.pages import table as table_of
from benchmarks.common.results import found_by, read_document
from benchmarks.common.timing import alternate, copy_rate
from varptq.native import binding
from varptq.native.linear import linear, pack
from varptq.native.quantize import Codebook, quantize
from varptq.native.room import Room
from varptq.quant.codebook import HALVES, entries, reach

QUICK_ROWS = (2, 32, 128, 512)
# Sets of the native core and what oneDNN and torch may use beside them.
SETS = {
    "avx2": ("AVX2", "avx2"),
    "avxvnni-evex": ("AVX2", "avx2"),
    "avx512vnni": ("AVX512_CORE_VNNI", "avx512"),
}
RESULT = "native_linear_sets"
FLOATS = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if has_bfloat16() else {})


class Timing(NamedTuple):
    """Seconds of one call by variant, and the floor of the integer ones."""

    layer: str
    rows: int
    seconds: dict[str, float]
    floor: dict[str, float]


def float_call(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """oneDNN's Linear with the weight packed for this number of rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda: linear(x, packed, bias, "none", [], "")


def integer_call(scheme: str, x: Tensor, outputs: int, bias: Tensor) -> Callable[[], Tensor]:
    row_bits, weight_bits, row_group, weight_group = SCHEMES[scheme]
    of_rows, of_weights = SCHEMES[scheme].books
    g = torch.Generator().manual_seed(0)
    groups, top = x.shape[1] // (weight_group or x.shape[1]), 2**weight_bits
    zero_point = torch.randint(0, top, (outputs, groups), generator=g).float()
    weight = pack(
        torch.randint(0, top, (outputs, x.shape[1]), generator=g, dtype=torch.uint8),
        torch.rand(outputs, groups, generator=g),
        torch.zeros_like(zero_point) if of_weights else zero_point,
        num_bits=weight_bits,
        row_group=row_group,
        table=entries(weight_bits) if of_weights else None,
    )
    book = Codebook(HALVES[row_bits], reach(row_bits)) if of_rows else None
    room = Room()  # as the runtime has it

    def call() -> Tensor:
        rows = quantize(
            x, num_bits=row_bits, row_group=row_group, weight_group=weight_group, codebook=book
        )
        return linear(rows, weight, bias, room=room)

    return call


def measure(rows: tuple[int, ...], budget: float, threads: int) -> Iterator[Timing]:
    peak, rate = binding.peak_gops() * 1e9 * threads, copy_rate(threads)
    g = torch.Generator().manual_seed(0)
    for name, inputs, outputs, times in LAYERS:
        weight = torch.randn(outputs, inputs, generator=g)
        bias = torch.randn(outputs, generator=g)
        for m in rows if times else (2,):
            x = torch.randn(m, inputs, generator=g)
            calls: dict[str, Callable[[], object]] = {
                name: float_call(*(t.to(dtype) for t in (x, weight, bias)))
                for name, dtype in FLOATS.items()
            }
            calls |= {s: integer_call(s, x, outputs, bias) for s in SCHEMES}
            floor = {
                s: max(
                    2 * m * inputs * outputs / peak if peak else 0.0,
                    inputs * outputs * (0.5 if bits <= 4 else 1.0) / rate,
                )
                for s, (_, bits, *_) in SCHEMES.items()
            }
            yield Timing(name, m, alternate(calls, budget, threads), floor)


def image(timings: list[Timing]) -> Timing:
    """Sum over an image; without all ten row counts, over those measured."""
    times = {name: count or 1 for name, _, _, count in LAYERS}
    variants = timings[0].seconds
    seconds = {v: sum(times[t.layer] * t.seconds[v] for t in timings) for v in variants}
    floor = {s: sum(times[t.layer] * t.floor[s] for t in timings) for s in SCHEMES}
    # ada_lin is called once in each block.
    ada = next(t for t in timings if t.layer == "ada_lin")
    for v in variants:
        seconds[v] += (DEPTH - 1) * ada.seconds[v]
    for s in SCHEMES:
        floor[s] += (DEPTH - 1) * ada.floor[s]
    return Timing("image", 0, seconds, floor)


def ratios(t: Timing) -> dict[str, float]:
    """What the integer variants gain, under the names of the report."""
    found = {}
    for s in SCHEMES:
        for name in FLOATS:
            found[f"{s} over {name}"] = t.seconds[name] / t.seconds[s]
        found[f"{s} share of floor"] = t.floor[s] / t.seconds[s]
    return found


def table(timings: list[Timing]) -> Iterator[str]:
    heads = [f"{name} ms" for name in FLOATS]
    for s in SCHEMES:
        heads += [f"{s} ms", *(f"x {name}" for name in FLOATS), "of floor"]
    yield "| layer | rows | " + " | ".join(heads) + " |"
    yield "|" + "---|" * (2 + len(heads))
    for t in timings:
        cells = [
            t.layer,
            str(t.rows or ""),
            *(f"{t.seconds[name] * 1e3:.3f}" for name in FLOATS),
        ]
        gain = ratios(t)
        for s in SCHEMES:
            cells += [
                f"{t.seconds[s] * 1e3:.3f}",
                *(f"{gain[f'{s} over {name}']:.2f}" for name in FLOATS),
                f"{gain[f'{s} share of floor']:.0%}",
            ]
        yield "| " + " | ".join(cells) + " |"


def every_set(machine: str) -> dict[str, Any]:
    """The seconds of "image" by set, for the sets that run here."""
    found: dict[str, Any] = {}
    for name, (onednn, aten) in SETS.items():
        if not binding.select_isa(name):
            continue
        caps = {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten, "VARPTQ_ISA": name}
        document = found_by("native_linear", "--quick", **caps)
        found[name] = {"seconds": document["timings"][-1]["seconds"], "peak": document["peak_gops"]}
    return {"machine": machine, "sets": found}


def report(document: dict[str, Any]) -> None:
    schemes = ("W8A8", "W4A8", "W2A8", "W4A4")
    head = ["native core", "its peak, Gop/s", "float32 of that class, s"]
    rows = []
    for name, case in document["sets"].items():
        taken = case["seconds"]
        cells = [f"{taken[s]:.2f} ({taken['float32'] / taken[s]:.2f}x)" for s in schemes]
        rows.append([name, f"{case['peak']:.0f}", f"{taken['float32']:.2f}", *cells])
    lines = [f"{document['machine']}, one thread; four of the ten row counts of an image.", ""]
    lines += table_of([*head, *(f"{s}, s (over float32)" for s in schemes)], rows)
    replace(DOCS / "tables" / "runtime.md", "sets", lines[:-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=Path, help="measure every set and write this file")
    parser.add_argument("--machine", default="", help="a word on the CPU, for the report")
    parser.add_argument("--report", action="store_true", help="only write docs/tables/runtime.md")
    parser.add_argument("--quick", action="store_true", help="four row counts, under a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="instruction set of the native core, if not the best")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    options = parser.parse_args()
    if options.report:
        report(read_document(RESULT))
        return 0
    if binding.core() is None:
        print(binding.reason(), file=sys.stderr)
        return 2
    if options.isa and not binding.select_isa(options.isa):
        print(
            f"--isa {options.isa} cannot run here, expected one of {', '.join(binding.features())}",
            file=sys.stderr,
        )
        return 2
    if options.sets:
        options.sets.write_text(json.dumps(every_set(options.machine), indent=1) + "\n")
        return 0
    torch.set_num_threads(options.threads)
    print(
        f"native core: {binding.isa()} of {', '.join(binding.features())}; "
        f"torch {torch.__version__}: {torch.backends.cpu.get_cpu_capability()}; "
        f"{options.threads} thread(s); peak {binding.peak_gops():.0f} Gop/s a thread"
    )
    timings = list(
        measure(
            QUICK_ROWS if options.quick else ROWS, 0.4 if options.quick else 1.5, options.threads
        )
    )
    timings.append(image(timings))
    print("\n".join(table(timings)))
    if options.json:
        document = {
            "isa": binding.isa(),
            "features": binding.features(),
            "threads": options.threads,
            "quick": options.quick,
            "peak_gops": binding.peak_gops(),
            "ratios": ratios(timings[-1]),
            "timings": [t._asdict() for t in timings],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
