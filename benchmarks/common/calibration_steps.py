"""The two costs of calibration: recording, and a step of learned rounding (for calibration.py).

The other side of each comparison is what replays the generation for every unit does: all samples
again, scale by scale, to feed one unit; and a step that calls the unit once per scale, with the
gradients that autograd derives from the plain quantizers. Seconds are of the processor, so other
processes on the machine count little, and of one thread; the calls of a comparison take turns, and
the least of the repeats is taken.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.reconstruct import train_step, unit_layers
from varptq.calibrate.record import Recorder, Unit
from varptq.calibrate.samples import CalibrationSet
from varptq.models.blocks import Attention
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.seams import Span, spans_of
from varptq.models.var.transformer import VAR, randomize
from varptq.models.var.vqvae import VQVAE
from varptq.quant import adaround, affine, layers
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.convert import convert
from varptq.quant.quantizers import QUANTIZERS

CONFIG = "w4a4+paper"
# Sums of products of powers of two and grid values often lie exactly between two codes, where the
# two orders of summation part; so gradients are compared with this one input in float.
WITHOUT_TIES = LayerRule(targets="blocks.*.proj", input=None)
BLOCKS = 2
FULL_SAMPLES, FULL_STEPS = 256, 5000
KINDS = {"attention": "blocks.1.attn", "FFN": "blocks.1.ffn", "single Linear": "head"}


def model_of(name: str, depth: int = BLOCKS) -> Pipeline:
    """`depth` blocks of a preset's shapes with random weights."""
    preset = PRESETS[name]
    arch = dataclasses.replace(preset.transformer_arch, depth=depth)
    with torch.random.fork_rng(devices=[]):
        var, vae = VAR(arch), VQVAE(preset.autoencoder_arch, arch.scales)
    randomize(var, torch.Generator().manual_seed(0))
    vae.randomize(torch.Generator().manual_seed(1))
    var.eval().requires_grad_(False)
    vae.eval().requires_grad_(False)
    return Pipeline(var, vae, name, (), {"var": "random", "vae": "random"})


def random_samples(pipe: Pipeline, count: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    pool, shape = pipe.pool(), pipe.alphabet.shape(count, pipe.scales.num_tokens)
    ids = torch.randint(pipe.alphabet.size, shape, generator=generator)
    return CalibrationSet(pool[torch.arange(count) % len(pool)], ids.to(pipe.device))


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


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
        recorder = Recorder(pipe, quantized.get_submodule, chosen, CalibrationConfig())

        def replay(pipe: Pipeline = pipe, chosen: CalibrationSet = chosen) -> None:
            generate(pipe, chosen.prompts, decode=False, forced=chosen.tokens)

        def stream(recorder: Recorder = recorder) -> None:
            for _ in recorder.units():
                pass

        found[depth] = least({"replay": replay, "stream": stream}, repeats)
    depth = PRESETS["var-d16"].transformer_arch.depth
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
        one = [Span(slice(0, span.length), span.ends)]
        extra: tuple[Any, ...] = (cache,) if isinstance(module, Attention) else ()
        parts.append(module(x_BLC[:, span.queries], one, *extra))
    return torch.cat(parts, 1)


@contextmanager
def plain_gradients() -> Iterator[None]:
    """Gradients as autograd derives them from the quantizers' definitions."""

    def weight(floor: Tensor, alpha: Tensor, grid: affine.Grid, num_bits: int) -> Tensor:
        codes = adaround.straight_through_codes(floor, alpha, num_bits)
        return affine.affine_values(codes, grid)

    plain = {name: dataclasses.replace(row, trained=None) for name, row in QUANTIZERS.items()}
    rounded = mock.patch.object(layers, "rounded_weight", weight)
    with mock.patch.dict(QUANTIZERS, plain), rounded:
        yield


def one_step(unit: Unit, alphas: list[nn.Parameter], rows: Tensor, fused: bool) -> list[Tensor]:
    """A step at rate 0; its gradients."""
    optimizer = torch.optim.Adam(alphas, lr=0.0, fused=fused)
    train_step(unit, rows, alphas, optimizer, 0.0, 2.0)
    return [alpha.grad for alpha in alphas if alpha.grad is not None]


def unit_of(pipe: Pipeline, config: QuantConfig, samples: int, name: str) -> Unit:
    model = convert(pipe.var, config)
    recorder = Recorder(
        pipe, model.get_submodule, random_samples(pipe, samples), CalibrationConfig()
    )
    return next(iter(recorder.units([name])))


def looped(unit: Unit, pipe: Pipeline) -> Unit:
    """The same unit, called once per scale."""
    spans = spans_of(pipe.scales)
    return dataclasses.replace(unit, run=lambda x: by_scale(unit.module, x.to(pipe.dtype), spans))


def apart(pipe: Pipeline, name: str, samples: int) -> float:
    """The largest relative difference of gradients between one pass with written gradients and the
    loop with derived ones, over the alphas of a unit."""
    config = QuantConfig.preset(CONFIG).with_rules(WITHOUT_TIES)
    unit = unit_of(pipe, config, samples, name)
    alphas = [layer.start_rounding(hard=True).alpha for layer in unit_layers(unit)]
    rows = torch.arange(2 * samples)
    ours = one_step(unit, alphas, rows, fused=True)
    with plain_gradients():
        theirs = one_step(looped(unit, pipe), alphas, rows, fused=False)
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def steps(samples: int, repeats: int) -> dict[str, Any]:
    """Seconds of a whole step per kind of unit: ours, the loop, and the loop with our gradients."""
    pipe = model_of("var-d16")
    found: dict[str, Any] = {}
    for kind, name in KINDS.items():
        unit = unit_of(pipe, QuantConfig.preset(CONFIG), samples, name)
        alphas = [layer.start_rounding(hard=True).alpha for layer in unit_layers(unit)]
        rows, loop = torch.arange(2 * samples), looped(unit, pipe)

        def derived(unit: Unit = loop, alphas: Any = alphas, rows: Tensor = rows) -> None:
            with plain_gradients():
                one_step(unit, alphas, rows, fused=False)

        def written(unit: Unit = loop, alphas: Any = alphas, rows: Tensor = rows) -> None:
            one_step(unit, alphas, rows, fused=True)

        def together(unit: Unit = unit, alphas: Any = alphas, rows: Tensor = rows) -> None:
            one_step(unit, alphas, rows, fused=True)

        for dtype in ("float32", "bfloat16"):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                calls = {"loop": derived, "loop_written": written, "together": together}
                times = least(calls, repeats)
            line = {**times, "ratio": times["loop"] / times["together"]}
            if dtype == "float32":
                line["apart"] = apart(pipe, name, samples)
            found[f"{kind}, {dtype}"] = line
            print(f"{kind}, {dtype}: {line}", flush=True)
    return {"batch": 2 * samples, "units": found}


def totals(record: dict[str, Any], step: dict[str, Any]) -> dict[str, float]:
    """Hours of the full setting on d16 in float32, ours and the replaying algorithm's."""
    depth, units = PRESETS["var-d16"].transformer_arch.depth, step["units"]
    hours = {}
    for ours, side in ((True, "together"), (False, "loop")):
        per_step = {kind: units[f"{kind}, float32"][side] for kind in KINDS}
        blocks = depth * (per_step["attention"] + per_step["FFN"]) + per_step["single Linear"]
        stream = record["stream_seconds_per_sample"]
        replays = record["replay_seconds_per_sample_and_unit"] * record["units"]
        seconds_ = FULL_SAMPLES * (stream if ours else replays) + FULL_STEPS * blocks
        hours["ours" if ours else "replay"] = seconds_ / 3600
    return {**hours, "ratio": hours["replay"] / hours["ours"]}
