"""Write a quantized pipeline as an artifact: packed tensors, config.json, a card, then one rename.

The folder appears whole or not at all (files.py). The same pipeline gives the same bytes: they hold
no time stamp and no machine name. The format is in format.py and schema.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from varptq.artifact.card import CARD_FILE, card
from varptq.artifact.format import (
    CONFIG_FILE,
    FORMAT_VERSION,
    SEAL,
    TRANSFORMER,
    WEIGHTS_FILE,
    pack_linear,
    packed_linears,
    plain_tensors,
)
from varptq.artifact.schema import (
    MAX_CONFIG_BYTES,
    Architecture,
    Document,
    Recipe,
    compressed_tensors_block,
    digest,
    plain,
)
from varptq.artifact.sizes import sizes
from varptq.errors import InputError, NonFiniteError
from varptq.files import StagedFolder
from varptq.models.bare import bare, check_layers
from varptq.models.pipeline import Pipeline
from varptq.models.state_file import file_sha256
from varptq.quant.pipeline import QuantizedPipeline
from varptq.torch_state import plain_torch


@plain_torch()
def save(pipeline: Pipeline, folder: str | Path, *, force: bool = False) -> Path:
    """Write `pipeline` to `folder` and return its path.

    force: replace a folder that holds a config.json; otherwise a folder that is not empty is an
    error. Raises `InputError` for a pipeline that is not quantized or a report that is not plain
    JSON, `NonFiniteError`, naming the tensor, for NaN or infinity, `OutputError` if the folder
    cannot be written. An error leaves nothing behind.
    """
    if not isinstance(pipeline, QuantizedPipeline):
        raise InputError(f"model {pipeline.name!r}: not quantized; quantize it before saving")
    if pipeline.runtime != "simulated":
        raise InputError(
            f"model {pipeline.name!r}: its codes are packed for runtime {pipeline.runtime!r}; load "
            "it with runtime simulated to save it"
        )
    pipeline = bare(pipeline)
    check_layers(pipeline)
    return write(pipeline, lambda: packed_tensors(pipeline), folder, force=force)


def write(
    pipeline: QuantizedPipeline,
    tensors: Callable[[], dict[str, Tensor]],
    folder: str | Path,
    *,
    force: bool = False,
) -> Path:
    """`save` for a pipeline whose transformer may be shapes alone, with the tensors of the artifact
    from elsewhere; they are asked for once the folder can be written."""
    described = document_of(pipeline)
    document = described.to_dict()
    with StagedFolder(folder, force=force, marker=CONFIG_FILE) as staging:
        weights = staging / WEIGHTS_FILE
        # A single entry: safetensors writes several in an order that changes from run to run.
        save_file(tensors(), weights, {SEAL: digest(document)})
        entry = {"bytes": weights.stat().st_size, "sha256": file_sha256(weights)}
        text = _encoded({**document, "files": {WEIGHTS_FILE: entry}})
        config = staging / CONFIG_FILE
        config.write_bytes(text)
        (staging / CARD_FILE).write_text(card(described), encoding="utf-8", newline="\n")
        # Some versions of safetensors write files that only the owner can read.
        weights.chmod(config.stat().st_mode)
    return Path(folder)


def document_of(pipeline: QuantizedPipeline) -> Document:
    """config.json without `files`."""
    architecture = Architecture.of(pipeline.family, pipeline.var.arch, pipeline.vae.arch)
    recipe = Recipe(
        config=pipeline.config,
        method=pipeline.method,
        theta=pipeline.theta,
        seed=pipeline.seed,
        calibration=plain(pipeline.calibration, "calibration"),
        report=plain(pipeline.report, "report"),
    )
    return Document(
        format_version=FORMAT_VERSION,
        varptq_version=_version(),
        name=pipeline.name,
        class_names=pipeline.class_names,
        architecture=architecture,
        quantization_config=compressed_tensors_block(pipeline.var),
        varptq=recipe,
        sources=pipeline.sources,
        sizes={kind: size.to_dict() for kind, size in sizes(pipeline).items()},
    )


def packed_tensors(pipeline: QuantizedPipeline) -> dict[str, Tensor]:
    """Every tensor of the artifact by name, on the CPU. Raises `NonFiniteError` naming the
    tensor."""
    tensors = plain_tensors(pipeline.var, pipeline.vae)
    for layer, linear in packed_linears(pipeline.var).items():
        for name, tensor in pack_linear(linear).items():
            tensors[f"{TRANSFORMER}{layer}.{name}"] = tensor
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"tensor {name}: holds NaN or infinity, so the model is not saved")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _encoded(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, indent=2, allow_nan=False).encode() + b"\n"
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(
            f"report: makes {CONFIG_FILE} {len(text)} bytes, expected at most {MAX_CONFIG_BYTES}; "
            "keep large results in separate files"
        )
    return text


def _version() -> str:
    try:
        return version("varptq")
    except PackageNotFoundError:
        # Run from the source tree.
        return "unknown"
