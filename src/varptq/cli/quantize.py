"""`varptq quantize`: from a float model to an artifact folder.

What can be refused is refused before anything is calibrated: settings, the place for the result,
the model. The folder appears whole at the very end; Ctrl-C or a failure leaves nothing.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq.cli import common
from varptq.errors import ConfigError, InputError

if TYPE_CHECKING:
    from varptq.calibrate.config import CalibrationConfig
    from varptq.quant.config import QuantConfig
    from varptq.quant.pipeline import QuantizedPipeline

FILE_TYPES = {".json", ".yaml", ".yml"}


def command(
    out: Annotated[Path, typer.Option(help="Folder of the artifact.")],
    source: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="demo, var-d16 .. var-d36.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    var: common.VarFile = None,
    vae: common.VaeFile = None,
    random: common.RandomModel = None,
    config: Annotated[str, typer.Option(help="w4a4, w6a6+litevar, ... or a file.")] = "w4a4",
    group_size: Annotated[
        int | None, typer.Option(help="Input channels per weight scale; must divide every layer.")
    ] = None,
    method: Annotated[str, typer.Option(help="rtn, brecq or sas.")] = "sas",
    calibration: Annotated[
        str, typer.Option(help="default, released, fast or a file.")
    ] = "default",
    samples: Annotated[int | None, typer.Option(help="Calibration images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Reconstruction steps per unit.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of BOPs shift-and-sum may add.")
    ] = None,
    seed: common.Seed = 0,
    download: common.Download = False,
    device: common.Device = "cpu",
    dtype: common.Dtype = "float32",
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Calibrate and quantize a model, and save it as an artifact."""
    from varptq.artifact import save
    from varptq.calibrate.methods import Method, quantize
    from varptq.progress import RichProgress

    Method.parse(method)
    quant_config = read_config(config, group_size)
    calibration_config = read_calibration(calibration, samples, steps, budget)
    if source is not None and model is not None:
        raise InputError(f"model: both {source!r} and --model {model!r} given; give one")
    choice = common.ModelChoice(source or model, var, vae, random, download, device, dtype)
    if choice.folder is not None:
        raise InputError(f"model {str(choice.folder)!r}: a folder, expected a float model")
    check_output(out, force)
    started = time.monotonic()
    pipe = choice.load_float()
    with RichProgress() as progress:
        quantized = quantize(
            pipe,
            quant_config,
            method=method,
            calibration=calibration_config,
            seed=seed,
            progress=progress,
        )
    save(quantized, out, force=force)
    document = summary(quantized, out, time.monotonic() - started)
    if json:
        common.print_json(document)
    else:
        common.print_rows("varptq quantize", rows(document))


def read_config(text: str, group_size: int | None) -> QuantConfig:
    """A preset or a file; `group_size` puts weights in groups that must divide every layer."""
    from varptq.quant.config import QuantConfig

    is_file = Path(text).suffix.lower() in FILE_TYPES
    config = QuantConfig.from_file(text) if is_file else QuantConfig.preset(text)
    if group_size is None:
        return config
    weight = config.linear.weight
    if weight is None:
        raise ConfigError(f"group size {group_size}: config {text!r} keeps weights in float")
    grouped = weight.replace(
        strategy="group", group_size=group_size, fallback=False, row_multiple=None
    )
    return config.replace(linear=config.linear.replace(weight=grouped))


def read_calibration(
    text: str, samples: int | None, steps: int | None, budget: float | None
) -> CalibrationConfig:
    """A preset or a file, with the numbers that were given put in."""
    from varptq.calibrate.config import CalibrationConfig

    is_file = Path(text).suffix.lower() in FILE_TYPES
    base = CalibrationConfig.from_file(text) if is_file else CalibrationConfig.preset(text)
    given = {"num_samples": samples, "steps": steps, "budget": budget}
    return base.replace(**{name: value for name, value in given.items() if value is not None})


class _TrialError(Exception):
    """Leaves the staging folder without publishing it."""


def check_output(out: Path, force: bool) -> None:
    """Refuse now what `save` would refuse after calibration: stage its folder and drop it."""
    from varptq.artifact.format import CONFIG_FILE
    from varptq.files import StagedFolder

    with suppress(_TrialError), StagedFolder(out, force=force, marker=CONFIG_FILE):
        raise _TrialError


def summary(quantized: QuantizedPipeline, out: Path, duration: float) -> dict[str, Any]:
    """What the run made, as plain JSON values."""
    return {
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
    """Distance of token frequencies from their probabilities, means over the scales."""
    if report is None:
        return None
    scales = report["scales"]
    means = {
        name: sum(scale[name] for scale in scales) / len(scales)
        for name in ("l1_before", "l1_after")
    }
    return {"moved": report["moved"], **means}


def units_summary(units: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Geometric means over the units, so that one with large activations does not decide alone.

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
        ("theta", common.theta_text(document["theta"])),
        ("resampling", resampling),
        ("units", units_text(document["units"])),
        ("time", common.seconds(document["seconds"])),
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
