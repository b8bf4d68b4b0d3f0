"""What calibration costs, against the algorithm that replays the generation for every unit.

    python benchmarks/calibration.py [--quick] [--parts ...] [--json FILE]

recording   time of one pass that feeds all units, and of a replay: all samples generated again,
            scale by scale, to feed one unit. Two blocks of the d16 width are timed, and all 16
            extrapolated, since every block costs the same.
step        one step of learned rounding per kind of unit, all scales in one pass, against the loop
            over scales (keys and values of earlier scales kept), and how far their gradients are
            apart; in float32 and under bfloat16 autocast.
effort      seconds and KL to the float model, on the demo model, as proof.py measures it
memory      peak of resident memory of two blocks of the d30 width under --memory

Both sides of a ratio alternate in one process, and the least of the repeats is taken, so that a
machine that does other things too disturbs both alike. --quick: fewer rows and repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from proof import held_out
from torch import Tensor, nn

import varptq
from varptq.calibrate.config import EFFORTS, CalibrationConfig
from varptq.calibrate.reconstruct import reconstruct, unit_layers, unit_loss
from varptq.calibrate.record import Recorder, Unit
from varptq.calibrate.samples import CalibrationSet
from varptq.evaluate.tokens import token_fidelity
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.var import VAR, Attention, Span, randomize, spans_of
from varptq.models.vqvae import VQVAE
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert

RESULTS = Path(__file__).parent / "results" / "calibration.json"
PARTS = ("recording", "step", "effort", "memory")
CONFIG = "w4a4+paper"
BLOCKS = 2
FULL_SAMPLES, FULL_STEPS = 256, 5000
KINDS = {"attention": "blocks.1.attn", "FFN": "blocks.1.ffn", "single Linear": "head"}


def model_of(name: str, depth: int = BLOCKS) -> Pipeline:
    """`depth` blocks of a preset's shapes with random weights."""
    preset = PRESETS[name]
    arch = dataclasses.replace(preset.var_arch, depth=depth)
    with torch.random.fork_rng(devices=[]):
        var, vae = VAR(arch), VQVAE(preset.vae_arch, arch.scales)
    randomize(var, torch.Generator().manual_seed(0))
    vae.randomize(torch.Generator().manual_seed(1))
    var.eval().requires_grad_(False)
    vae.eval().requires_grad_(False)
    return Pipeline(var, vae, name, (), {"var": "random", "vae": "random"})


def random_samples(pipe: Pipeline, count: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    shape = (count, pipe.scales.num_tokens)
    ids = torch.randint(pipe.var.arch.codebook_size, shape, generator=generator)
    return CalibrationSet(torch.arange(count) % pipe.num_classes, ids)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def least(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least seconds of each call, the calls taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: min(found) for name, found in times.items()}


def recording(samples: int, repeats: int) -> dict[str, Any]:
    """Seconds per sample of both ways at 2 and 1 blocks, and what follows for the whole d16."""
    found: dict[int, dict[str, float]] = {}
    for depth in (1, BLOCKS):
        pipe = model_of("var-d16", depth)
        chosen = random_samples(pipe, samples)
        quantized = convert(pipe.var, QuantConfig.preset(CONFIG))
        recorder = Recorder(pipe, quantized, chosen, CalibrationConfig())

        def replay(pipe: Pipeline = pipe, chosen: CalibrationSet = chosen) -> None:
            generate(pipe, chosen.labels_N, decode=False, forced=chosen.ids_NL)

        def stream(recorder: Recorder = recorder) -> None:
            for _ in recorder.units():
                pass

        found[depth] = least({"replay": replay, "stream": stream}, repeats)
    depth = PRESETS["var-d16"].var_arch.depth
    whole = {}
    for name in ("replay", "stream"):
        block = (found[BLOCKS][name] - found[1][name]) / (BLOCKS - 1)
        whole[name] = (found[1][name] + (depth - 1) * block) / samples
    units = 3 * depth + 3
    return {
        "samples": samples,
        "units": units,
        "stream_seconds_per_sample": whole["stream"],
        "replay_seconds_per_sample_and_unit": whole["replay"],
        # A replay passes all tokens of all rows through all blocks, as the stream does once.
        "ratio_flops": float(units),
        "ratio_time": units * whole["replay"] / whole["stream"],
    }


class GrowingCache:
    """Keys and values of the scales so far, through which gradients flow."""

    def __init__(self) -> None:
        self.parts: tuple[list[Tensor], list[Tensor]] = ([], [])

    def append(self, k_BHlc: Tensor, v_BHlc: Tensor) -> tuple[Tensor, Tensor]:
        for kept, new in zip(self.parts, (k_BHlc, v_BHlc), strict=True):
            kept.append(new)
        return torch.cat(self.parts[0], 2), torch.cat(self.parts[1], 2)


def by_scale(module: nn.Module, x_BLC: Tensor, spans: list[Span]) -> Tensor:
    """The output of a unit computed scale after scale."""
    cache, parts = GrowingCache(), []
    for span in spans:
        one = [Span(slice(0, span.queries.stop - span.queries.start), span.keys, span.scale)]
        extra: tuple[Any, ...] = (cache,) if isinstance(module, Attention) else ()
        parts.append(module(x_BLC[:, span.queries], one, *extra))
    return torch.cat(parts, 1)


def gradients(unit: Unit, alphas: list[nn.Parameter], rows: Tensor, output: Tensor) -> list[Tensor]:
    loss = unit_loss(output, unit.target(rows), unit.token_weights)
    return list(torch.autograd.grad(loss, alphas))


def steps(batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward per kind of unit, and the largest relative difference."""
    pipe = model_of("var-d16")
    model = convert(pipe.var, QuantConfig.preset(CONFIG))
    recorder = Recorder(pipe, model, random_samples(pipe, batch), CalibrationConfig())
    found: dict[str, Any] = {}
    for kind, name in KINDS.items():
        unit = next(iter(recorder.units([name])))
        for dtype, line in step_of(unit, spans_of(pipe.scales), batch, repeats).items():
            found[f"{kind}, {dtype}"] = line
            print(f"{kind}, {dtype}: {line}", flush=True)
    return {"batch": batch, "units": found}


def step_of(unit: Unit, spans: list[Span], batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """One unit, by dtype."""
    alphas = [layer.start_rounding(hard=True).alpha for layer in unit_layers(unit)]
    rows = torch.arange(batch)
    inputs = unit.inputs[rows].float()
    last: dict[str, list[Tensor]] = {}

    def together() -> None:
        last["together"] = gradients(unit, alphas, rows, unit.run(inputs))

    def loop() -> None:
        last["loop"] = gradients(unit, alphas, rows, by_scale(unit.module, inputs, spans))

    found = {}
    for dtype in ("float32", "bfloat16"):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            times = least({"loop": loop, "together": together}, repeats)
        pairs = zip(last["loop"], last["together"], strict=True)
        apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        found[dtype] = {**times, "ratio": times["loop"] / times["together"], "apart": apart}
    for layer in unit_layers(unit):
        layer.finish_rounding()
    return found


def totals(record: dict[str, Any], step: dict[str, Any]) -> dict[str, float]:
    """Hours of the full setting on d16 in float32, ours and the replaying algorithm's."""
    depth, units = PRESETS["var-d16"].var_arch.depth, step["units"]
    hours = {}
    for ours, side in ((True, "together"), (False, "loop")):
        per_step = {kind: units[f"{kind}, float32"][side] for kind in KINDS}
        blocks = depth * (per_step["attention"] + per_step["FFN"]) + per_step["single Linear"]
        stream = record["stream_seconds_per_sample"]
        replays = record["replay_seconds_per_sample_and_unit"] * record["units"]
        seconds_ = FULL_SAMPLES * (stream if ours else replays) + FULL_STEPS * blocks
        hours["ours" if ours else "replay"] = seconds_ / 3600
    return {**hours, "ratio": hours["replay"] / hours["ours"]}


def efforts(names: list[str]) -> list[dict[str, Any]]:
    pipe = varptq.load_model("demo")
    test = held_out(pipe)
    lines = []
    for name in ("rtn", *names):
        calibration = CalibrationConfig.preset("fast" if name == "rtn" else name)
        method = "rtn" if name == "rtn" else "brecq"
        config = QuantConfig.preset(CONFIG)
        started = time.perf_counter()
        model = varptq.quantize(pipe, config, method=method, calibration=calibration)
        spent = time.perf_counter() - started
        kl = token_fidelity(pipe, model, test.labels_N, test.ids_NL).kl_filtered
        lines.append({"effort": name, "seconds": spent, "kl": kl})
        print(f"{name}: {spent:.0f} s, KL {kl:.4f}", flush=True)
    return lines


def memory(samples: int, gibibytes: float) -> dict[str, Any]:
    """Two blocks of the d30 width, one step per unit, activations within the budget."""
    pipe = model_of("var-d30")
    model = convert(pipe.var, QuantConfig.preset(CONFIG))
    before = peak()
    with tempfile.TemporaryDirectory() as spool:
        config = CalibrationConfig(
            num_samples=samples, steps=1, batch_size=2, memory_gb=gibibytes, spool_dir=spool
        )
        for unit in Recorder(pipe, model, random_samples(pipe, samples), config).units():
            reconstruct(unit, config, 0)
    return {"samples": samples, "memory_gb": gibibytes, "model_gib": before, "peak_gib": peak()}


def peak() -> float:
    """Most resident memory of this process so far, in GiB (mapped pages of spool files count)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS))
    parser.add_argument("--samples", type=int, default=256, help="of the memory run")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of its activations")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, repeats = (1, 2) if arguments.quick else (4, 5)
    makers: dict[str, Callable[[], Any]] = {
        "recording": lambda: recording(count, repeats),
        "step": lambda: steps(2 * count, repeats),
        "effort": lambda: efforts(arguments.efforts),
        "memory": lambda: memory(arguments.samples, arguments.memory),
    }
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for part in arguments.parts:
        found[part] = makers[part]()
        print(part, json.dumps(found[part], indent=1), flush=True)
    if "recording" in found and "step" in found:
        found["total"] = totals(found["recording"], found["step"])
        print("total", json.dumps(found["total"]), flush=True)
    found["settings"] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": arguments.threads,
        "quick": arguments.quick,
    }
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
