"""`varptq.load`: an artifact from disk on the runtime asked for."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch

from varptq.artifact.load import empty_modules, read_config
from varptq.artifact.load import load as load_artifact
from varptq.artifact.mapped import return_free_memory
from varptq.models.placement import checked_device, checked_dtype
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import convert_linear, finish
from varptq.runtime.decoder import decode_in
from varptq.runtime.resolve import AUTO, Choice, asked_for, resolve
from varptq.torch_state import plain_torch

SLOW = "; slower than the float model"


@plain_torch()
def load(
    folder: str | Path,
    *,
    runtime: str = AUTO,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> QuantizedPipeline:
    """The quantized pipeline stored in `folder`, ready to compute on `runtime`.

    runtime: "auto" or a name of `varptq.runtime.RUNTIMES`; the choice is in the result's `runtime`.
    dtype: of the float parts and of the arithmetic; on an integer runtime, of the image decoder
    alone, the rest being integers and float32. Warns where "auto" has to be "simulated", with the
    reason. Raises `InputError` for a runtime that is not there or does not execute the config, by
    layer; `ConfigError` for a device that is not here or a dtype no model computes in;
    `ArtifactError` naming the file and what is wrong.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    choice = choose(folder, runtime=runtime, device=device)
    if choice.fallback:
        warnings.warn(f"artifact {folder}: runs on {choice.runs_on}{SLOW}", stacklevel=2)
    if choice.kernels is None:
        return load_artifact(folder, device=device, dtype=dtype)
    # A layer goes from its codes to the kernels' layout before the next one is read.
    adopt = partial(convert_linear, kernels=choice.kernels)
    pipeline = load_artifact(folder, dtype=torch.float32, adopt=adopt)
    pipeline = decode_in(finish(pipeline, choice.kernels).to(device=device), dtype)
    return_free_memory()
    return pipeline


@plain_torch()
def choose(
    folder: str | Path, *, runtime: str = AUTO, device: str | torch.device = "cpu"
) -> Choice:
    """Who would compute the artifact in `folder`, and why; no weight is read. Raises as `load`."""
    asked_for(runtime)
    document, _ = read_config(folder)
    var, _ = empty_modules(folder, document)
    return resolve(var, runtime, device)
