"""What one batch of images takes on a device, and what of it is drawing and decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import varptq
from benchmarks.common.runtime_variants import TimedSampler
from varptq.models.pipeline import Pipeline

PARTS = ("transformer", "drawing", "decoder")
Milliseconds = dict[str, float]


class Run(NamedTuple):
    """Milliseconds by part, and the tokens (B, L)."""

    taken: Milliseconds
    tokens: Tensor


class Watch:
    """Milliseconds between two marks: events of the GPU, or the clock where there is none."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Waits for `last` to have happened."""
        if not self.on_gpu:
            return 1e3 * (last - first)
        last.synchronize()
        return first.elapsed_time(last)


def timed(pipe: Pipeline) -> Callable[[int, bool], Run]:
    """A function of the number of images and whether CUDA graphs run them. `transformer` has the
    token map, `drawing` guidance, filters and the random numbers, which the CPU makes so that they
    are those of any device."""
    watch, found = Watch(pipe.device), dict.fromkeys(PARTS, 0.0)
    decode = pipe.vae.decode_features

    def clock() -> float:
        """Seconds, once the device has done what it was told."""
        if watch.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def decode_timed(features: Tensor) -> Tensor:
        started = watch.mark()
        images = decode(features)
        found["decoder"] += watch.between(started, watch.mark())
        return images

    def add(seconds: float) -> None:
        found["drawing"] += 1e3 * seconds

    pipe.vae.decode_features = decode_timed
    sampler: Any = TimedSampler(pipe.sampler, add, clock)
    pipe.sampler = sampler

    def run(batch: int, graphs: bool) -> Run:
        found.update(dict.fromkeys(PARTS, 0.0))
        labels = [pipe.var.arch.num_classes // 5] * batch
        started = watch.mark()
        made = varptq.generate(pipe, labels, seed=0, batch_size=batch, cuda_graphs=graphs)
        whole = watch.between(started, watch.mark())
        found["transformer"] = whole - found["drawing"] - found["decoder"]
        return Run(dict(found), made.tokens.cpu())

    return run
