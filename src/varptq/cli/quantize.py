"""`varptq quantize`: from a float model to an artifact folder.

What can be refused is refused before anything is calibrated: settings, the place for the result,
the model. The folder appears whole at the very end; Ctrl-C or a failure leaves nothing.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq.cli import common
from varptq.errors import ConfigError, InputError

if TYPE_CHECKING:
    from varptq.calibrate.config import CalibrationConfig
    from varptq.quant.config import QuantConfig
    from varptq.quant.pipeline import QuantizedPipeline

Setting = typer.Option
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
    calibration: Annotated[str, typer.Option(help="default, released, fast or a file.")] = "default",
    samples: Annotated[int | None, typer.Option(help="Calibration images.")] = None,
    steps: Annotated[int | None, typer.Option(help="Reconstruction steps per unit.")] = None,
    budget: Annotated[float | None, typer.Option(help="Share of BOPs shift-and-sum may add.")] = None,
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
