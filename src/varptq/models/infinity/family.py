"""Infinity as a row of the table of families."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from varptq.models import convolutions
from varptq.models.autoencoder import Autoencoder
from varptq.models.family import Family, FileNames
from varptq.models.infinity import checkpoint
from varptq.models.infinity.bsqvae import BSQVAE, BSQVAEArch
from varptq.models.infinity.document import InfinityDocument
from varptq.models.infinity.fresh import filled
from varptq.models.infinity.presets import PRESETS
from varptq.models.infinity.transformer import Infinity, InfinityArch
from varptq.models.meta import on_meta
from varptq.models.state_file import read_state
from varptq.models.tensors import load_strict, naming
from varptq.models.transformer import Transformer


def transformer_of(arch: InfinityArch) -> Infinity:
    """On the meta device: the values of a large one are then there once, in their own dtype."""
    with on_meta():
        return Infinity(arch)


def autoencoder_of(arch: BSQVAEArch, transformer: InfinityArch) -> BSQVAE:
    """An autoencoder on the transformer's schedule."""
    return BSQVAE(arch, transformer.scales)


def read(
    transformer_path: Path, autoencoder_path: Path, dtype: torch.dtype | None
) -> tuple[Transformer, Autoencoder]:
    """Both networks from checkpoint files, at the usual size. Raises `CheckpointError`."""
    state = read_state(transformer_path, "infinity", dtype)
    with naming(transformer_path):
        state = checkpoint.own_names(state)
        arch = checkpoint.infer_infinity(state)
    transformer = transformer_of(arch)
    known = checkpoint.known_only(state, transformer.state_dict(), str(transformer_path))
    load_strict(transformer, known, str(transformer_path))
    state = checkpoint.plain_names(read_state(autoencoder_path, "bsqvae", dtype))
    with naming(autoencoder_path):
        autoencoder_arch = checkpoint.infer_bsqvae(state, arch.token_bits)
    with on_meta():
        autoencoder = autoencoder_of(autoencoder_arch, arch)
    # An encoder or decoder that has more than ours computes something else.
    parts = (*BSQVAE.ENCODING, *BSQVAE.DECODING)
    wanted = {*autoencoder.state_dict(), *(n for n in state if n.partition(".")[0] in parts)}
    known = checkpoint.known_only(state, wanted, str(autoencoder_path))
    load_strict(autoencoder, known, str(autoencoder_path))
    return transformer, autoencoder


def fill(transformer: Transformer, autoencoder: Autoencoder, generator: torch.Generator) -> None:
    """Values of a fresh, trainable model."""
    for _ in fill_parts(transformer, autoencoder, generator):
        pass


def fill_parts(
    transformer: Transformer, autoencoder: Autoencoder, generator: torch.Generator
) -> Iterator[nn.Module]:
    """The same, module by module of the transformer."""
    assert isinstance(transformer, Infinity) and isinstance(autoencoder, BSQVAE)
    yield from filled(transformer, generator)
    convolutions.randomize(autoencoder, generator)


INFINITY_FAMILY = Family(
    "infinity",
    transformer_of,
    autoencoder_of,
    InfinityDocument,
    read,
    fill,
    PRESETS,
    "infinity",
    fill_parts,
    # The published autoencoders are called infinity_vae_d32reg.pth and so on.
    file_names=FileNames(re.compile("infinity(?!_vae)"), re.compile("(infinity_)?vae")),
    reads_texts=Infinity.READS_TEXTS,
)
