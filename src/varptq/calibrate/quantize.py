"""`quantize`: the whole path from a float pipeline to a quantized one, by the steps of a method.

Which methods there are, which steps each has, and which one stands where none is named are
methods.py's to say; what a step sees is run.py's.
"""

from __future__ import annotations

from typing import Any

import torch

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.methods import Method, default_method
from varptq.calibrate.run import Run
from varptq.calibrate.tune import check_tunable
from varptq.errors import InputError
from varptq.models.bare import bare, check_layers
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import Prompts
from varptq.models.state_file import networks_sha256
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.find import release_float_weights
from varptq.quant.pipeline import QuantizedPipeline
from varptq.torch_state import plain_torch
from varptq.work import Work

# Raised when what a piece of a work folder holds, or how it is computed, changes.
WORK_FORMAT = 4


@plain_torch()
def quantize(
    pipe: Pipeline,
    config: QuantConfig,
    *,
    method: str | None = None,
    calibration: CalibrationConfig | None = None,
    prompts: Any = None,
    seed: int = 0,
    progress: Progress = silent,
    work: Work | None = None,
) -> QuantizedPipeline:
    """Quantize the transformer of a float pipeline, and its autoencoder as the config says.

    method: a name in `METHODS`, such as "sas", or one with single parts switched on
    ("brecq+shift"); None is the `default_method` of config and calibration. prompts: to draw
    calibration images for, as `Pipeline.prompts` takes them; None is the model's own pool. The
    float pipeline is
    left as it is; the result shares what stays in float with it. `report` of the result holds what
    the steps found: the resampling statistic, theta with its bit-operation account, the losses of
    every unit, what end-to-end tuning changed. Same seed, settings and thread count give the same
    result. `work`, entered, keeps what is finished, and says which of several processes on the same
    call this is (work.py). Raises `ConfigError` for an unknown method and for settings that
    contradict the model, `InputError` for a pipeline that is quantized already or that another
    program has changed, `NonFiniteError` for NaN or infinity by layer.
    """
    method = default_method(config, calibration) if method is None else method
    calibration = Method.parse(method).settle(calibration or CalibrationConfig())
    pipe, calibration = prepared(pipe, calibration, prompts)
    check_tunable(pipe, calibration)
    # Before the work folder is touched: it finds settings that contradict the model.
    run = Run(pipe, config, calibration, seed, progress, work or Work())
    quantized = carried_out(run, method)
    release_float_weights(run.quantized)
    return quantized


def carried_out(run: Run, method: str) -> QuantizedPipeline:
    """The steps of the method on a fresh run, and what comes of it."""
    pipe, calibration = run.pipe, run.calibration
    if pipe.chosen is not None:
        run.report["prompts"] = chosen(pipe.chosen)
    if run.work.folder is not None:
        run.work.begin(identity(pipe, run.config, method, calibration, run.seed), run.progress)
    for step in Method.parse(method).steps:
        step(run)
    return QuantizedPipeline.of(
        pipe,
        run.quantized,
        run.autoencoder,
        config=run.config,
        method=method,
        theta=run.theta,
        seed=run.seed,
        calibration=calibration.to_dict(),
        report=run.report,
    )


def prepared(
    pipe: Pipeline, calibration: CalibrationConfig, prompts: Any
) -> tuple[Pipeline, CalibrationConfig]:
    """The bare float pipeline that draws for `prompts`, and the settings with its own values where
    nothing was said. Raises `InputError` for a pipeline that is quantized already or that another
    program has changed."""
    if isinstance(pipe, QuantizedPipeline):
        raise InputError(f"model {pipe.name!r}: already quantized; give the float pipeline")
    pipe = bare(pipe).drawing_for(prompts)
    check_layers(pipe, hooks=True)
    return pipe, calibration.replace(sampling=pipe.filled(calibration.sampling))


def chosen(prompts: Prompts) -> dict[str, Any]:
    """What stands in a report for the prompts that calibration images are drawn for."""
    return {"count": len(prompts), "sha256": prompts.sha256()}


def identity(
    pipe: Pipeline, config: QuantConfig, method: str, calibration: CalibrationConfig, seed: int
) -> dict[str, Any]:
    """What decides the result of `quantize`, bit for bit on one machine, as plain values.

    Where activations spool to is left out; how much memory there is decides their dtype.
    """
    prompts = {} if pipe.chosen is None else {"prompts": chosen(pipe.chosen)}
    return {
        **prompts,
        "format": WORK_FORMAT,
        "model": pipe.name,
        "model_sha256": networks_sha256(pipe.var, pipe.vae),
        "sources": pipe.sources,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype),
        "config": config.to_dict(),
        "method": method,
        "calibration": calibration.replace(spool_dir=None).to_dict(),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
