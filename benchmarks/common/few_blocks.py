"""Published models with random weights and fewer blocks than they have, and artifacts as deep as
the published models whose blocks are all one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.runtime_variants import simulated
from varptq.artifact.format import slots
from varptq.artifact.save import packed_tensors, write
from varptq.models.families import family
from varptq.models.family import ModelPreset
from varptq.models.meta import on_meta
from varptq.models.pipeline import Pipeline
from varptq.models.presets import preset
from varptq.quant.convert import convert

A_BLOCK = re.compile(r"\.blocks\.\d+\.")


def build(model: str, depth: int, dtype: torch.dtype) -> Pipeline:
    """`build_model` of the preset with `depth` blocks."""
    published = preset(model)
    arch = dataclasses.replace(published.transformer_arch, depth=depth)
    return with_archs(published, (arch, published.autoencoder_arch), dtype)


def with_archs(published: ModelPreset, archs: tuple[Any, Any], dtype: torch.dtype) -> Pipeline:
    """`build_model` of the preset with these architectures of transformer and autoencoder."""
    row = family(published.family)
    networks = row.build(*archs)
    for network in networks:
        network.to(dtype=dtype).eval().requires_grad_(False)
    row.randomize(*networks, torch.Generator().manual_seed(0))
    for network in networks:
        network.requires_grad_(False)
    return Pipeline(*networks, published.name, family=row.name)


def save_repeated(model: str, size: str, config: str, folder: Path) -> int:
    """Save an artifact of all blocks, each with the tensors of one that was rounded to nearest
    without calibration, for images of `size`; returns the number of blocks."""
    one = simulated(build(model, 1, torch.float32).sized(size), config)
    arch = dataclasses.replace(one.var.arch, depth=preset(model).transformer_arch.depth)
    with on_meta():
        shapes = type(one.var)(arch)
    whole = dataclasses.replace(one, var=convert(shapes, one.config))
    found = packed_tensors(one)
    # Copies: a file of safetensors holds no tensor twice.
    tensors = {name: found[A_BLOCK.sub(".blocks.0.", name)] for name in slots(whole.var, whole.vae)}
    write(whole, lambda: {name: tensor.clone() for name, tensor in tensors.items()}, folder)
    return arch.depth
