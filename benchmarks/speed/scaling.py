"""Wall time of a calibration on several GPUs: a model with measured steps and stated assumptions.

    python -m benchmarks.speed.scaling

    wall = samples / ranks + pass of the float model (on every rank) + longest share of the units
    step = 3 b multiply-adds (forward, and backward at twice its cost) / rate, b rows

Units are dealt as `Ranks.share_by_cost` deals them. The rate of one thread of the machine is what
results/calibration.json (calibration.py) found per kind of unit, quantizers included; that of a GPU
is assumed. Writes the tables between the markers of docs/scaling.md, those of
results/calibration.json alone too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.common.calibration_steps import FULL_SAMPLES, FULL_STEPS
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import read_document
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.tune import BATCH
from varptq.distributed import Ranks
from varptq.models.presets import PRESETS

# Multiply-adds a second that a GPU is assumed to sustain in a step, quantizers included.
GPU_RATE = 20e12
STEP_PASSES = 3
RANKS = (1, 8, 64)


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a model: depth, width C, tokens L, codebook entries V."""

    depth: int
    width: int
    tokens: int
    vocabulary: int

    @classmethod
    def of(cls, name: str) -> Shape:
        arch = PRESETS[name].transformer_arch
        return cls(arch.depth, arch.width, arch.scales.num_tokens, arch.codebook_size)

    def units(self) -> dict[str, float]:
        """Multiply-adds of one row through each unit over tokens; the others are negligible."""
        linear = self.width**2 * self.tokens
        found = {}
        for index in range(self.depth):
            found[f"{index}.attention"] = 4 * linear + self.tokens**2 * self.width
            found[f"{index}.FFN"] = 8.0 * linear
        return {**found, "single Linear": float(self.width * self.vocabulary * self.tokens)}


# Depth 32, width 2048, all scales of 1024 x 1024 pixels; 2 x 32 bitwise logits; its
# cross-attention to the text is left out.
MODELS = {
    "VAR-d30": Shape.of("var-d30"),
    "Infinity-2B": Shape(32, 2048, 10521, 64),
}


def wall(shape: Shape, config: CalibrationConfig, ranks: int, rate: float) -> tuple[float, ...]:
    """Seconds of generation, the float pass, the longest share of the units, and tuning."""
    units = shape.units()
    rows = 2 * config.num_samples
    whole = rows * sum(units.values()) / rate
    step = STEP_PASSES * config.batch_size / rate
    # GPTQ passes the unit once per layer, two at most, and one more to add up the moments.
    solving = 3 * rows / rate if config.solves else 0.0
    shares = (Ranks(rank, ranks).share_by_cost(units) for rank in range(ranks))
    longest = max(sum(units[name] for name in share) for share in shares)
    learning = longest * (config.steps * config.learns * step + solving)
    # One process tunes: guided batches, the float model's answers and a step.
    tuned_rows = config.tune_steps * 2 * BATCH
    tuning = tuned_rows * (1 + STEP_PASSES) * sum(units.values()) / rate
    return whole / ranks, whole, learning, tuning


def machine_rates(found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Kind of unit, seconds of a step as measured, and multiply-adds a second."""
    units = Shape.of("var-d16").units()
    for kind in ("attention", "FFN", "single Linear"):
        seconds = found["units"][f"{kind}, float32"]["together"]
        cost = next(cost for name, cost in units.items() if name.endswith(kind))
        yield kind, seconds, STEP_PASSES * found["batch"] * cost / seconds


def duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"


def tables(found: dict[str, Any]) -> list[str]:
    lines = [
        f"| unit of d16, {found['batch']} rows | step, one CPU thread | multiply-adds a second |",
        "|---|---|---|",
    ]
    lines += [f"| {kind} | {s:.2f} s | {rate:.2e} |" for kind, s, rate in machine_rates(found)]
    full = CalibrationConfig(num_samples=FULL_SAMPLES, steps=FULL_STEPS)
    settings = {name: CalibrationConfig.preset(name) for name in ("fast", "standard", "max")}
    settings[f"{FULL_SAMPLES} samples, {FULL_STEPS} steps"] = full
    lines += ["", "| model | setting | GPUs | samples | float pass | units | tuning | wall |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for model, shape in MODELS.items():
        for setting, config in settings.items():
            for ranks in RANKS:
                parts = wall(shape, config, ranks, GPU_RATE)
                cells = " | ".join(duration(part) for part in (*parts, sum(parts)))
                lines.append(f"| {model} | {setting} | {ranks} | {cells} |")
    return lines


def effort_table(found: dict[str, Any]) -> list[str]:
    lines = ["| config | effort | seconds | KL |", "|---|---|---|---|"]
    for line in found["effort"]:
        cells = (line["config"], line["effort"], f"{line['seconds']:.0f}", f"{line['kl']:.4f}")
        lines.append(f"| {' | '.join(cells)} |")
    fewest, most = found["d16"][0], found["d16"][-1]
    wanted = CalibrationConfig.preset("fast").num_samples
    slope = (most["seconds"] - fewest["seconds"]) / (most["samples"] - fewest["samples"])
    minutes = (most["seconds"] + slope * (wanted - most["samples"])) / 60
    return [
        *lines,
        "",
        f"`fast` on random weights of the d16 shapes, one thread: {fewest['seconds'] / 60:.0f} "
        f"minutes with {fewest['samples']} samples and {most['seconds'] / 60:.0f} with "
        f"{most['samples']}, so {minutes:.0f} with its {wanted}, on the line through both (from "
        "runs of 1 and 2 blocks; all 16 cost the same).",
    ]


def speed_table(found: dict[str, Any]) -> list[str]:
    record, total, memory = (found[part] for part in ("recording", "total", "memory"))
    lines = [
        "| unit of d16 | type | loop over scales | the loop, gradients ours | one pass | ratio "
        "| gradients apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, line in found["step"]["units"].items():
        kind, dtype = name.split(", ")
        times = [f"{line[side]:.2f} s" for side in ("loop", "loop_written", "together")]
        distance = f"{line['apart']:.0e}" if "apart" in line else ""
        lines.append(
            f"| {kind} | {dtype} | {' | '.join(times)} | {line['ratio']:.2f} | {distance} |"
        )
    return [
        *lines,
        "",
        f"Recording: {record['stream_seconds_per_sample']:.1f} seconds a sample for all "
        f"{record['units']} units of d16, {record['ratio_time']:.0f} times less than replays, and "
        f"{record['ratio_flops']:.0f} times less in multiply-adds of the transformer. With "
        f"{FULL_SAMPLES} samples and {FULL_STEPS} steps for every unit: {total['ours']:.0f} hours "
        f"against {total['replay']:.0f}, {total['ratio']:.1f} times less, in float32.",
        "",
        f"Memory: two blocks of d30 in {memory['dtype']}, {memory['samples']} samples, "
        f"`--memory {memory['memory_gb']:g}GB`: peak of {memory['peak_gib']:.1f} GiB resident, of "
        f"which {memory['model_gib']:.1f} before recording.",
    ]


if __name__ == "__main__":
    measured = read_document("calibration")
    replace(DOCS / "scaling.md", "efforts", effort_table(measured))
    replace(DOCS / "scaling.md", "speed", speed_table(measured))
    replace(DOCS / "scaling.md", "scaling", tables(measured["step"]))
