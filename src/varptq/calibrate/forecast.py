"""What a call of `quantize` will take here, before it starts: seconds by part, and memory.

    seconds = sum over parts of  outside of blocks + blocks x inside of one
              x seconds of the clock for one of the processor, over the whole probe

Parts are timed by probe.py on the model's own shapes, on its first block and a few images, and
multiplied by blocks, images and steps. Memory is added up from shapes, over what the
process has already.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from varptq import readable
from varptq.calibrate.clock import now
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.methods import Method, default_method
from varptq.calibrate.probe import (
    CENTER,
    CONVERT,
    DRAW,
    GATE,
    RECORD,
    SMOOTH,
    THETA,
    TUNE,
    Probe,
    wants_means,
)
from varptq.calibrate.probe_units import EVALUATE, LEARN, SOLVE, Cost, Costs
from varptq.calibrate.quantize import prepared
from varptq.calibrate.reconstruct import reconstruct
from varptq.calibrate.record import Recorder, record_bytes
from varptq.calibrate.samples import CalibrationSet
from varptq.calibrate.smoothing import SAMPLES, wants_smoothing
from varptq.calibrate.theta import choose_theta
from varptq.calibrate.tune import BATCH, HELD_OUT, WEIGHT_BYTES, images_for
from varptq.models.generate import DEFAULT_BATCH
from varptq.models.memory import image_bytes
from varptq.models.pipeline import Pipeline
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.seams import linears_of
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.convert import check_groups, check_rules, shared_copy
from varptq.torch_state import plain_torch

STAGE = "forecast"
# What the weights are there in besides the float model's own, in its bytes: rotated in float32 and
# as codes, and once more where smoothing has a copy.
CONVERTED, SMOOTHED = 1.25, 1.0
# Less than this, by the rough account, is not looked into.
BRIEF = 30.0
# Matrices in float64 of a layer's inputs by its inputs, and copies of its weight in float64, while
# it is solved.
MATRICES, WEIGHTS = 5, 4


@dataclass(frozen=True)
class Forecast:
    """What `quantize` will do and take here.

    method, images, steps: those in use; steps are of learning per unit, at most, 0 where none are
    made. processor: seconds of it, of all threads together; of the clock where a GPU computes.
    parts: seconds of the clock by part, in the order of the steps; empty where the first pass
    showed that all of it takes less than a minute. memory: most bytes of the process; spooled:
    bytes of files that recorded activations are left in. probe_seconds, probe_images, blocks,
    threads: how long one of the blocks was measured, on how many images and threads.
    """

    method: str
    images: int
    steps: int
    tune_steps: int
    processor: float
    parts: dict[str, float]
    memory: int
    spooled: int
    probe_seconds: float
    probe_images: int
    blocks: int
    threads: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"seconds": self.seconds, **asdict(self)}

    @property
    def work(self) -> str:
        """What will be done: "gptq, 256 images"."""
        words = [self.method, f"{self.images} images" if self.images else "no images"]
        if self.steps:
            words.append(f"up to {self.steps} steps for each part that learns its rounding")
        if self.tune_steps:
            words.append(f"{self.tune_steps} steps of tuning")
        return ", ".join(words)

    @property
    def time(self) -> str:
        """How long, with the longest parts."""
        if not self.parts:
            return "less than a minute here"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        longest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        shares = ", ".join(f"{name} {readable.seconds(s)}" for name, s in longest)
        return f"about {readable.seconds(self.seconds)} here on {threads}: {shares}"

    @property
    def room(self) -> str:
        """How much memory, and what lies in files."""
        text = f"about {readable.megabytes(self.memory)}"
        if self.spooled:
            text += f", and {readable.megabytes(self.spooled)} of files for recorded activations"
        return text

    def rows(self, free: int | None) -> list[tuple[str, str]]:
        """All of it for people. free: bytes of memory that are, None where nobody knows."""
        room = self.room + ("" if free is None else f"; {readable.megabytes(free)} are free")
        texts = (self.work, self.time, room, self.basis)
        return list(zip(("work", "time", "memory", "measured"), texts, strict=True))

    @property
    def basis(self) -> str:
        """What was measured, and what was multiplied."""
        if not self.parts:
            return "by one image through one block"
        images = f", {self.probe_images} image{'s' * (self.probe_images != 1)}"
        return (
            f"in {self.probe_seconds:.1f} s on 1 of {self.blocks} blocks"
            f"{images if self.images else ''}; multiplied by blocks, images and steps"
        )


@plain_torch()
def forecast(
    pipe: Pipeline,
    config: QuantConfig,
    *,
    method: str | None = None,
    calibration: CalibrationConfig | None = None,
    prompts: Any = None,
    processes: int = 1,
    placed: Mapping[str, Any] | None = None,
    briefly: bool = False,
    progress: Progress = silent,
) -> Forecast:
    """What `quantize` with these settings will take on this machine.

    processes: that share its work. briefly: leave the parts out where one pass shows that all will
    be done in less than a minute. placed: device and dtype of a model that is left on its files and
    quantized block by block; bringing its blocks is not in the seconds. Errors are those of
    `quantize`, found early.
    """
    began = time.monotonic()
    method = default_method(config, calibration) if method is None else method
    recipe = Method.parse(method)
    pipe, settings = prepared(pipe, recipe.settle(calibration or CalibrationConfig()), prompts)
    check_rules(pipe.var, config)
    check_groups(pipe.var, config)
    depth, draws = pipe.var.arch.depth, _draws(pipe, config, recipe, settings)
    cut = _first_block(pipe, placed)
    probe = Probe(cut, depth, config, recipe, settings, draws)
    clock, processor = time.perf_counter(), now(cut)
    first = probe.first_pass() if draws else 0.0
    parts: dict[str, float] = {}
    if not (briefly and first * probe.passes() < BRIEF):
        progress(STAGE, 0, 1)
        parts = _seconds(probe.costs(), recipe, settings, processes)
        progress(STAGE, 1, 1)
    slower = (time.perf_counter() - clock) / max(now(cut) - processor, 1e-9)
    memory, spooled = _memory(pipe, recipe, settings, probe, placed)
    learns = reconstruct in recipe.steps and settings.learns
    return Forecast(
        method,
        settings.num_samples if draws else 0,
        settings.steps if learns else 0,
        settings.tune_steps,
        sum(parts.values()),
        {name: seconds * slower for name, seconds in parts.items()},
        memory,
        spooled,
        time.monotonic() - began,
        probe.images if draws else 0,
        depth,
        torch.get_num_threads(),
    )


def _draws(
    pipe: Pipeline, config: QuantConfig, method: Method, settings: CalibrationConfig
) -> bool:
    """Whether any step reads calibration images."""
    if {reconstruct, choose_theta} & set(method.steps) or settings.tune_steps:
        return True
    layers = linears_of(pipe.var)
    return any(wants_means(config, name) or wants_smoothing(config, name) for name in layers)


def _first_block(pipe: Pipeline, placed: Mapping[str, Any] | None) -> Pipeline:
    """The model cut to its first block, with modules of its own on the same memory; of a mapped
    model in memory."""
    var = pipe.var.first_blocks(1)
    if placed is None:
        return replace(pipe, var=shared_copy(var))
    device, dtype = checked_device(placed["device"]), checked_dtype(placed["dtype"])
    var, vae = (copy.deepcopy(n).to(device=device, dtype=dtype) for n in (var, pipe.vae))
    return replace(pipe, var=var.eval().requires_grad_(False), vae=vae)


def _seconds(
    costs: Costs, method: Method, settings: CalibrationConfig, processes: int
) -> dict[str, float]:
    """By part, of the whole model. Processes share drawing and units."""
    images, thetas = settings.num_samples, method.steps.count(choose_theta)
    counts = {
        CONVERT: (0, 1),
        DRAW: (images, processes),
        SMOOTH: (min(SAMPLES, images), 1),
        CENTER: (images, 1),
        THETA: (thetas * min(settings.theta_samples, images), 1),
        RECORD: (images, 1),
        SOLVE: (images, processes),
        EVALUATE: (0, processes),
        LEARN: (settings.steps, processes),
        TUNE: (settings.tune_steps, 1),
        GATE: (HELD_OUT, 1),
    }
    found = {name: costs.get(name, Cost()).of(n) / by for name, (n, by) in counts.items()}
    if settings.tune_steps:
        found[TUNE] += costs[DRAW].of(images_for(settings))
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def _memory(
    pipe: Pipeline,
    method: Method,
    settings: CalibrationConfig,
    probe: Probe,
    placed: Mapping[str, Any] | None,
) -> tuple[int, int]:
    """Most bytes of this process, and bytes of files."""
    var, images = pipe.var, settings.num_samples
    size = 4 if placed is None else checked_dtype(placed["dtype"]).itemsize
    whole = sum(p.numel() for p in var.parameters())
    block = (whole - sum(p.numel() for p in var.first_blocks(1).parameters())) / max(
        1, var.arch.depth - 1
    )
    copies = CONVERTED + SMOOTHED
    weights = copies * size * whole
    if placed is not None:
        # One block in float with its quantizers; of the others codes, where they are solved.
        weights = (1 + copies) * size * (block + max(0.0, whole - var.arch.depth * block))
    batch = image_bytes(pipe, is_guided=True)
    most = batch * min(DEFAULT_BATCH, images) if probe.draws else 0
    spooled = 0
    if reconstruct in method.steps:
        samples = CalibrationSet(
            pipe.pool()[:1], torch.empty(1, 0, dtype=torch.int64, device="cpu")
        )
        recorder = Recorder(pipe, var.get_submodule, samples, settings)
        numel = recorder.numel * images
        as_float, as_half = record_bytes(numel, recorder.most_units)
        limit = settings.memory_gb * 2**30
        record = as_float if as_float <= limit else as_half
        if record > limit:
            record, spooled = 0, as_half
        working = max(batch, probe.saved)
        if settings.solves:
            working = max(working, _solving(pipe))
        most = max(most, record + working)
    if settings.tune_steps:
        saved = probe.tuning or BATCH * batch * var.arch.depth
        most = max(most, saved + batch + WEIGHT_BYTES * whole)
    return int(_resident() + weights + most), spooled


def _solving(pipe: Pipeline) -> int:
    """Bytes that the closed form takes for the largest layer."""
    return max(
        8 * (MATRICES * x.in_features**2 + WEIGHTS * x.in_features * x.out_features)
        for x in linears_of(pipe.var).values()
    )


def _resident() -> int:
    """Bytes of this process now, 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
