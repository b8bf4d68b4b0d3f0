"""A whole image on the CPU: float models, our simulated path and our integers, side by side.

    python benchmarks/runtime_cpu.py [--quick] [--threads 1 2] [--batches 1 8] [--json FILE]

VAR-d16 with random weights and real shapes, one process, the variants in turn, medians. Float
variants: "eager" computes AdaLN at every scale as upstream does, in float32 and under bf16
autocast; "prepacked" has oneDNN's own weight layout and AdaLN once per image. Ours is nearest
rounding, whose time is that of any rounding. Linears alone are native_linear.py, attention alone
native_attention.py, which this script runs too for the ratios. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline, build_model
from varptq.models.var import VAR, Condition
from varptq.native import binding
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert, release_float_weights
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import on_integers
from varptq.runtime.cpu import cpu_kernels
from varptq.runtime.decoder import decode_in

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runtime_cpu.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
PRESETS = ("w8a8", "w6a6", "w4a8", "w4a4")
QUICK_PRESETS = ("w8a8", "w4a4")
MUST = {
    "transformer over eager fp32": (4.5, 7.0),
    "transformer over prepacked bf16": (1.4, 1.25),
    "image over eager fp32": (3.5, 4.5),
    "image over eager bf16 autocast": (1.5, 1.5),
    "image over simulated": (6.0, 6.0),
}


class PrepackedLinear(nn.Module):
    """A Linear on oneDNN's packed weights, float32 in and out."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.out_features = dtype, linear.out_features
        weight = linear.weight.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class EveryScale(VAR):
    """AdaLN computed anew at every scale, as upstream's blocks do."""

    def step(self, x_BlC: Tensor, condition: Condition, scale: int, cache: Any) -> Tensor:
        if scale:
            labels = self._labels
            condition = self.condition(labels)
        return super().step(x_BlC, condition, scale, cache)

    def condition(self, labels_B: Tensor) -> Condition:
        self._labels = labels_B
        return super().condition(labels_B)


def eager(pipe: Pipeline) -> Pipeline:
    """The same weights with upstream's order of work."""
    shared = {id(t): t for t in (*pipe.var.parameters(), *pipe.var.buffers())}
    var = copy.deepcopy(pipe.var, shared)
    var.__class__ = EveryScale
    return Pipeline(var, pipe.vae, "eager", pipe.class_names)


def prepacked(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    shared = {id(t): t for t in (*pipe.var.parameters(), *pipe.var.buffers())}
    var = copy.deepcopy(pipe.var, shared)
    for name, module in list(var.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(var.get_submodule(parent), child, PrepackedLinear(module, dtype))
    return Pipeline(var, pipe.vae, "prepacked", pipe.class_names)


def simulated(pipe: Pipeline, preset: str) -> QuantizedPipeline:
    config = QuantConfig.preset(preset)
    var = convert(pipe.var, config).requires_grad_(False)
    release_float_weights(var)
    return QuantizedPipeline(
        var, copy.deepcopy(pipe.vae), preset, pipe.class_names, config=config, method="rtn"
    )


Variant = Callable[[int], tuple[float, float]]


def variant(pipe: Pipeline, autocast: bool = False) -> Variant:
    """Seconds of the transformer with sampling, and of the decoder, for one batch."""

    def run(batch: int) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            started = time.perf_counter()
            tokens = generate(pipe, [207] * batch, seed=0, batch_size=batch, decode=False).tokens
            between = time.perf_counter()
            with torch.inference_mode():
                f_hat = pipe.vae.quantize.accumulate(tokens)
                pipe.vae.decode_features(f_hat)
            return between - started, time.perf_counter() - between

    return run


def variants(presets: tuple[str, ...]) -> dict[str, Variant]:
    """Every way to an image, made from one set of random weights."""
    pipe = build_model("var-d16")
    found = {
        "eager fp32": variant(eager(pipe)),
        "eager bf16 autocast": variant(eager(pipe), autocast=True),
        "prepacked fp32": variant(prepacked(pipe, torch.float32)),
        "prepacked bf16": variant(prepacked(pipe, torch.bfloat16), autocast=True),
    }
    for preset in presets:
        quantized = simulated(pipe, preset)
        if preset == presets[0]:
            found["simulated"] = variant(quantized)
        ours = on_integers(quantized, cpu_kernels())
        found[preset] = variant(decode_in(ours, torch.bfloat16))
    return found


def measure(found: dict[str, Variant], batch: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of both parts, variants in turn, after one warm-up round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, run in found.items():
            if name == "simulated" and number > 1:
                continue
            taken = run(batch)
            if number or name == "simulated":
                times[name].append(taken)
    return {
        name: (statistics.median(t for t, _ in taken), statistics.median(d for _, d in taken))
        for name, taken in times.items()
    }


def ratios(times: dict[str, tuple[float, float]], preset: str) -> dict[str, float]:
    ours, whole = times[preset][0], sum(times[preset])
    return {
        "transformer over eager fp32": times["eager fp32"][0] / ours,
        "transformer over prepacked bf16": times["prepacked bf16"][0] / ours,
        "image over eager fp32": sum(times["eager fp32"]) / whole,
        "image over eager bf16 autocast": sum(times["eager bf16 autocast"]) / whole,
        "image over simulated": sum(times["simulated"]) / whole,
    }


def parts(script: str) -> Any:
    """What a benchmark of one part finds with --quick."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, str(HERE / script), "--quick", "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


def show(case: dict[str, Any]) -> None:
    print(f"\nbatch {case['batch']}, {case['threads']} thread(s); seconds: transformer, decoder")
    for name, (transformer, decoder) in case["seconds"].items():
        print(f"  {name:20} {transformer:7.2f} {decoder:7.2f}")
    for preset, found in case["ratios"].items():
        for name, ratio in found.items():
            must = MUST[name][0 if "amx" not in binding.features() else 1]
            print(f"  {preset}: {name:34} {ratio:5.2f}x   must {must}x")


def report() -> None:
    """The committed result as tables of docs/benchmarks.md."""
    document = json.loads(RESULTS.read_text())
    lines = [
        f"Instruction set of the native core: {document['isa']}; torch {document['torch']}; "
        f"{document['machine']}."
    ]
    for case in document["cases"]:
        lines += ["", f"Batch {case['batch']}, {case['threads']} thread(s):", ""]
        lines += ["| variant | transformer and sampling, s | decoder, s |", "|---|---|---|"]
        lines += [f"| {name} | {t:.2f} | {d:.2f} |" for name, (t, d) in case["seconds"].items()]
        presets = list(case["ratios"])
        lines += ["", "| ratio | must | " + " | ".join(presets) + " |"]
        lines += ["|---" * (2 + len(presets)) + "|"]
        for name, (must, _) in MUST.items():
            cells = [f"{case['ratios'][preset][name]:.2f}x" for preset in presets]
            lines.append(f"| {name} | {must}x | " + " | ".join(cells) + " |")
    begin, end = "<!-- runtime: begin -->", "<!-- runtime: end -->"
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text("\n".join([before + begin, *lines, end + rest.partition(end)[2]]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batch 1, one thread, two presets")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--machine", default="", help="a word on the machine, for the report")
    parser.add_argument("--report", action="store_true", help="only write docs/benchmarks.md")
    options = parser.parse_args()
    if options.report:
        report()
        return
    presets, rounds = (QUICK_PRESETS, 1) if options.quick else (PRESETS, 3)
    threads, batches = ((1,), (1,)) if options.quick else (options.threads, options.batches)
    print(f"native core: {binding.isa()} of {binding.features()}")
    found = variants(presets)
    cases = []
    for count in threads:
        torch.set_num_threads(count)
        for batch in batches:
            times = measure(found, batch, rounds)
            case = {"batch": batch, "threads": count, "seconds": times}
            case["ratios"] = {preset: ratios(times, preset) for preset in presets}
            show(case)
            cases.append(case)
    document = {"isa": binding.isa(), "features": binding.features(), "quick": options.quick,
                "torch": torch.__version__, "machine": options.machine, "cases": cases}  # fmt: skip
    if not options.quick:
        document["linears"] = parts("native_linear.py")
        document["attention"] = parts("native_attention.py")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
