"""`varptq.load`: read an artifact, from a folder or the hub, and put it on a runtime."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch

from varptq.artifact.load import load as load_artifact
from varptq.artifact.load import read_blank, reading_blank
from varptq.artifact.mapped import return_free_memory
from varptq.artifact.remote import artifact_folder
from varptq.models.placement import checked_device, checked_dtype
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import convert_linear, finish
from varptq.runtime.decoder import decode_in
from varptq.runtime.resolve import AUTO, Choice, asked_for, resolve
from varptq.torch_state import plain_torch

SLOW = "; slower than the float model"


@plain_torch()
def load(
    source: str | Path,
    *,
    runtime: str = AUTO,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> QuantizedPipeline:
    """The quantized pipeline of an artifact, ready to compute on `runtime`.

    source: a folder, or "org/name" or "org/name@revision", a repository of the Hugging Face hub
    where there is no folder of that name; its files are fetched into the hub's cache unless they
    are there. runtime: "auto" or a name of `varptq.runtime.RUNTIMES`; the choice is in the result's
    `runtime`. dtype: of the float parts and of the arithmetic; on an integer runtime, of the image
    decoder alone, where that computes in float, as the rest is integers and float32. Warns, with
    the reason, if "auto" falls back to "simulated". Raises `InputError` for a runtime that does not
    exist or, naming the layer, cannot execute the config; `ConfigError` for a device that this
    machine lacks or a dtype in which no model computes; `ArtifactError` naming the file and what is
    wrong with it; `HubError` for a repository that cannot be had, `OutputError` for a disk without
    room for it.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    asked_for(runtime)
    folder = artifact_folder(source)
    with reading_blank(folder) as blank:
        choice = resolve(blank.var, runtime, device)
        if choice.fallback:
            warnings.warn(f"artifact {source}: runs on {choice.runs_on}{SLOW}", stacklevel=2)
        if choice.kernels is None:
            return load_artifact(folder, device=device, dtype=dtype, blank=blank)
        # Each layer is brought into the kernels' layout before the next one is read.
        adopt = partial(convert_linear, kernels=choice.kernels)
        pipeline = load_artifact(folder, dtype=torch.float32, adopt=adopt, blank=blank)
    pipeline = decode_in(finish(pipeline, choice.kernels).to(device=device), dtype)
    return_free_memory()
    return pipeline


@plain_torch()
def choose(
    source: str | Path, *, runtime: str = AUTO, device: str | torch.device = "cpu"
) -> Choice:
    """The runtime that would execute an artifact, and why; reads no weights. Raises as `load`
    does."""
    asked_for(runtime)
    return resolve(read_blank(artifact_folder(source)).var, runtime, device)
