"""`varptq.load`: an artifact from disk on the runtime asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from varptq import artifact
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.resolve import AUTO, resolve


def load(
    folder: str | Path,
    *,
    runtime: str = AUTO,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> QuantizedPipeline:
    """The quantized pipeline stored in `folder`, ready to compute on `runtime`.

    runtime: "auto" or a name of `varptq.runtime.RUNTIMES`; the choice is in the result's `runtime`.
    dtype: of the float parts and of the arithmetic. Raises `InputError` for a runtime that is not
    there or a dtype that is not floating, `ArtifactError` naming the file and what is wrong.
    """
    name = resolve(runtime)
    pipeline = artifact.load(folder, device=device, dtype=dtype)
    pipeline.runtime = name
    return pipeline
