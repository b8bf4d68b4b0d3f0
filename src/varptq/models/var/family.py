"""The row of VAR in the table of families."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from varptq.models.autoencoder import Autoencoder
from varptq.models.family import Family, FileNames
from varptq.models.meta import on_meta
from varptq.models.tensors import naming
from varptq.models.transformer import Transformer
from varptq.models.var import checkpoint
from varptq.models.var.document import VARDocument
from varptq.models.var.presets import PRESETS
from varptq.models.var.transformer import VAR, VARArch, randomize
from varptq.models.var.vqvae import VQVAE, VQVAEArch


def autoencoder_of(arch: VQVAEArch, transformer: VARArch) -> VQVAE:
    """A VQVAE on the transformer's schedule: one serves models of several."""
    return VQVAE(arch, transformer.scales)


def read(
    transformer_path: Path, autoencoder_path: Path, dtype: torch.dtype | None
) -> tuple[Transformer, Autoencoder]:
    """Both networks from checkpoint files. Raises `CheckpointError`."""
    state = checkpoint.read_state(transformer_path, "var", dtype)
    with naming(transformer_path):
        state = checkpoint.completed(state)
        arch = checkpoint.infer_var(state)
    with on_meta():
        transformer = VAR(arch)
    checkpoint.load_strict(transformer, state, str(transformer_path))
    state = checkpoint.read_state(autoencoder_path, "vae", dtype)
    with naming(autoencoder_path):
        autoencoder_arch = checkpoint.infer_vqvae(state)
    with on_meta():
        autoencoder = autoencoder_of(autoencoder_arch, arch)
    checkpoint.load_strict(autoencoder, state, str(autoencoder_path))
    checkpoint.check_pair(arch, autoencoder_arch)
    return transformer, autoencoder


def fill(transformer: Transformer, autoencoder: Autoencoder, generator: torch.Generator) -> None:
    """Values of a fresh, trainable model."""
    assert isinstance(transformer, VAR) and isinstance(autoencoder, VQVAE)
    randomize(transformer, generator)
    autoencoder.randomize(generator)


VAR_FAMILY = Family(
    "var",
    VAR,
    autoencoder_of,
    VARDocument,
    read,
    fill,
    PRESETS,
    "var",
    file_names=FileNames(re.compile("var"), re.compile("vae")),
)
