"""What `varptq quantize` says: before it starts what it will do and take, afterwards what was made
and what to do with it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq import readable
from varptq.cli import common

if TYPE_CHECKING:
    import torch

    from varptq.calibrate.forecast import Forecast
    from varptq.models.pipeline import Pipeline
    from varptq.quant.config import QuantConfig
    from varptq.quant.pipeline import QuantizedPipeline


def plan(
    pipe: Pipeline, config: QuantConfig, forecast: Forecast, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What will be done, and what it will take here, as plain JSON values. dtype: of the artifact,
    None for the model's."""
    from varptq.artifact.sizes import foreseen
    from varptq.models.memory import free_bytes

    return {
        "model": pipe.name,
        "config": config.name,
        "bits": {"weights": _bits(config, "weight"), "inputs": _bits(config, "input")},
        "forecast": forecast.to_dict(),
        "free_memory": free_bytes(pipe.device),
        "sizes": common.sizes(foreseen(pipe, config, dtype)),
    }


def _bits(config: QuantConfig, operand: str) -> int | None:
    spec = getattr(config.linear, operand)
    return None if spec is None else spec.num_bits


def plan_rows(document: dict[str, Any], forecast: Forecast, default: str) -> list[tuple[str, str]]:
    """For people. default: the config that stands where none is named."""
    bits = {name: f"{n} bits" if n else "float" for name, n in document["bits"].items()}
    name = document["config"] + (", the default" if document["config"] == default else "")
    return [
        ("config", f"{name}: weights {bits['weights']}, inputs {bits['inputs']}"),
        *forecast.rows(document["free_memory"]),
        ("artifact", common.whole_text(document["sizes"])),
    ]


def next_commands(out: Path, reads_texts: bool, float_words: list[str]) -> list[str]:
    """Three command lines that go on with the artifact. float_words: how the command line names a
    float model that an artifact cannot find by itself."""
    asked = ["--prompt", "a red car"] if reads_texts else ["--classes", "0,1,2"]
    lines = (
        ["varptq", "generate", str(out), *asked, "--out", f"{out}-images"],
        ["varptq", "evaluate", str(out), *float_words, "--out", f"{out}-report"],
        ["varptq", "serve", str(out)],
    )
    return [shlex.join(line) for line in lines]


def summary(quantized: QuantizedPipeline, out: Path, duration: float) -> dict[str, Any]:
    """The result of the run, as plain JSON values."""
    return {
        "runs_on": common.runs_on(quantized),
        "artifact": str(out),
        "model": quantized.name,
        "config": quantized.config.name,
        "method": quantized.method,
        "seed": quantized.seed,
        "calibration": quantized.calibration,
        "sizes": common.sizes(quantized),
        "theta": common.theta_summary(quantized),
        "resampling": resampling_summary(quantized.report.get("resampling")),
        "units": units_summary(quantized.report.get("units", [])),
        "seconds": duration,
    }


def resampling_summary(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """L1 distance of token frequencies from their probabilities, mean over the scales."""
    if report is None:
        return None
    scales = report["scales"]
    means = {
        name: sum(scale[name] for scale in scales) / len(scales)
        for name in ("l1_before", "l1_after")
    }
    return {"moved": report["moved"], **means}


def units_summary(units: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Geometric means over the units, so that a unit with large activations does not dominate.

    hard_over_nearest: loss of the learned rounding over that of nearest rounding.
    hard_over_soft: loss of what is deployed over the loss of what was trained, 1 where they agree.
    """
    if not units:
        return None
    return {
        "count": len(units),
        "kept_nearest": sum(unit["kept"] == "nearest" for unit in units),
        "hard_over_nearest": _mean_ratio(units, "loss_hard", "loss_nearest"),
        "hard_over_soft": _mean_ratio(units, "loss_hard", "loss_soft"),
        "units": units,
    }


def _mean_ratio(units: list[dict[str, Any]], above: str, below: str) -> float | None:
    pairs = [(unit[above], unit[below]) for unit in units if unit[above] > 0 and unit[below] > 0]
    if not pairs:
        return None
    return math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs))


def rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    moved = document["resampling"]
    resampling = "off"
    if moved:
        resampling = (
            f"{moved['moved']} tokens moved, L1 {moved['l1_before']:.3f} to {moved['l1_after']:.3f}"
        )
    return [
        ("model", document["model"]),
        ("config, method", f"{document['config']}, {document['method']}, seed {document['seed']}"),
        *common.size_rows(document["sizes"]),
        ("runs on", document["runs_on"]),
        ("theta", common.theta_text(document["theta"])),
        ("resampling", resampling),
        ("units", units_text(document["units"])),
        ("time", readable.seconds(document["seconds"])),
        ("written", document["artifact"]),
    ]


def units_text(units: dict[str, Any] | None) -> str:
    if units is None:
        return "nearest rounding"
    text = f"{units['count']} reconstructed"
    if (ratio := units["hard_over_nearest"]) is not None:
        text += f", loss {ratio:.2f} of nearest rounding"
    if (gap := units["hard_over_soft"]) is not None:
        text += f", hard / soft {gap:.2f}"
    if units["kept_nearest"]:
        text += f"; {units['kept_nearest']} kept nearest"
    return text
