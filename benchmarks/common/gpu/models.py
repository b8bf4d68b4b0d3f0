"""The models that are measured on a GPU: random weights, one block that stands for all of them.

A dry run has the same parts at widths that Triton's interpreter computes in seconds.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from benchmarks.common.few_blocks import with_archs
from varptq.models.pipeline import Pipeline
from varptq.models.presets import preset
from varptq.models.scales import Scales

MODELS = ("var-d16", "var-d30")
TINY_SCALES = Scales((1, 2))
TINY_TRANSFORMER: dict[str, Any] = {
    "width": 128,
    "num_heads": 2,
    "scales": TINY_SCALES,
    "codebook_size": 32,
    "code_dim": 8,
    "num_classes": 5,
}
TINY_AUTOENCODER: dict[str, Any] = {
    "ch": 32,
    "ch_mult": (1, 1),
    "num_res_blocks": 1,
    "code_dim": 8,
    "codebook_size": 32,
    "num_phi": 2,
    "attn_levels": (1,),
    "hit_scales": 0,
}


def one_block(model: str, dry: bool) -> Pipeline:
    """The preset in float32 with a single block."""
    published = preset(model)
    transformer, autoencoder = published.transformer_arch, published.autoencoder_arch
    if dry:
        transformer = dataclasses.replace(transformer, **TINY_TRANSFORMER)
        autoencoder = dataclasses.replace(autoencoder, **TINY_AUTOENCODER)
    transformer = dataclasses.replace(transformer, depth=1)
    return with_archs(published, (transformer, autoencoder), torch.float32)


def depth(model: str, dry: bool) -> int:
    """Blocks of the published model; one in a dry run."""
    return 1 if dry else preset(model).transformer_arch.depth


def deepened(pipe: Pipeline, count: int) -> Pipeline:
    """In place: `count` blocks, each with tensors of its own, all copies of the one there is."""
    var: Any = pipe.var
    (block,) = var.blocks
    var.blocks = nn.ModuleList([block, *(copy.deepcopy(block) for _ in range(count - 1))])
    var.arch = dataclasses.replace(var.arch, depth=count)
    return pipe
