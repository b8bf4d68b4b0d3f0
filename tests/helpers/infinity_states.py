"""Small models of the Infinity family, and their tensors under the names that checkpoints have."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varptq.models.family import ModelPreset
from varptq.models.infinity.bsqvae import BSQVAEArch
from varptq.models.infinity.family import INFINITY_FAMILY
from varptq.models.infinity.schedules import schedule
from varptq.models.infinity.transformer import InfinityArch
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.texts import TextPrompts

State = dict[str, Tensor]

SCALES = Scales(((1, 1), (2, 2), (3, 2)), (6, 4))
# 24 channels: the norms have 24 groups there, 16 of them a token's bits in patches.
VAE_ARCH = BSQVAEArch(ch=24, ch_mult=(1, 4), num_res_blocks=1, code_dim=4, patchify=True)
ARCH = InfinityArch(
    depth=4,
    width=32,
    num_heads=2,
    ffn_width=48,
    token_bits=VAE_ARCH.token_bits,
    text_channels=20,
    text_maxlen=6,
    pool_heads=4,
    levels=15,
    scales=SCALES,
)
PRESET = ModelPreset("tiny", ARCH, VAE_ARCH, None, "", "", family="infinity")


def features(*lengths: int, channels: int = ARCH.text_channels, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, channels, generator=generator) for length in lengths]


class Words:
    """A text encoder: for each word a vector that depends on the word alone, and one for the
    end."""

    def features(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.stack([_word(word) for word in (*text.split(), ".")]) for text in texts]


def _word(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little")
    return torch.randn(ARCH.text_channels, generator=torch.Generator().manual_seed(seed))


def pipeline(maps: int = 4, seed: int = 0, text_maxlen: int = 9) -> Pipeline:
    """A model that draws at the sizes of a template, at the first `maps` maps of the square one,
    and reads words."""
    arch = sized(scales=schedule(maps), text_maxlen=text_maxlen)
    networks = INFINITY_FAMILY.build(arch, VAE_ARCH)
    for network, state in zip(networks, states(arch, seed=seed), strict=True):
        network.load_state_dict(state, assign=True)
        network.eval().requires_grad_(False)
    return Pipeline(*networks, "tiny-text", family="infinity", encoder=Words())


def prompts(*lengths: int) -> TextPrompts:
    return TextPrompts.of(features(*lengths))


def states(
    arch: InfinityArch = ARCH, vae_arch: BSQVAEArch = VAE_ARCH, seed: int = 0
) -> tuple[State, State]:
    """Transformer and autoencoder under our names, no value the same as another's."""
    networks = INFINITY_FAMILY.build(arch, vae_arch)
    INFINITY_FAMILY.randomize(*networks, torch.Generator().manual_seed(seed))
    var, vae = (dict(network.state_dict()) for network in networks)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in var.items():
        if tensor.dim() == 1 and "zero_k_bias" not in name:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return var, vae


def theirs(state: State, per_chunk: int = 0) -> State:
    """Upstream's names of a transformer's tensors, in chunks of so many blocks or without."""
    found: State = {}
    for name, tensor in state.items():
        name = name.replace(".attn.", ".sa.").replace(".cross.", ".ca.")
        name = name.replace(".cross_norm.", ".ca_norm.").replace("text_proj.", "text_proj_for_ca.")
        name = name.replace("text_pool.query_1Hc", "text_proj_for_sos.ca.mat_q")
        name = name.replace("text_pool.", "text_proj_for_sos.ca.")
        if per_chunk and name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            chunk, block = divmod(int(number), per_chunk)
            name = f"block_chunks.{chunk}.module.{block}.{rest}"
        found[name] = tensor
    return found


def wrapped(state: State) -> State:
    """An autoencoder's names with wrappers around convolutions and norms, and the bookkeeping."""
    found: State = {"quantizer.lfq.mask": torch.ones(4, dtype=torch.int64)}
    for name, tensor in state.items():
        path, leaf = name.rsplit(".", 1)
        found[f"{path}.{'norm' if 'norm' in path.split('.')[-1] else 'conv'}.{leaf}"] = tensor
    found["quantize.lfq.mask"] = found["quantizer.lfq.mask"]
    return found


def sized(**changes: Any) -> InfinityArch:
    return dataclasses.replace(ARCH, **changes)
