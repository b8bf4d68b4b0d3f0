"""Small checkpoints of both networks, as upstream stores them, for the tests of reading them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from varptq.models.scales import Scales
from varptq.models.var.transformer import VAR, VARArch, randomize
from varptq.models.var.vqvae import VQVAE, VQVAEArch

State = dict[str, Tensor]

MASK = "attn_bias_for_masking"
SCALES = Scales((1, 2, 3))
VAE_ARCH = VQVAEArch(
    ch=32,
    ch_mult=(1, 2, 1),
    num_res_blocks=2,
    code_dim=5,
    codebook_size=37,
    num_phi=3,
    attn_levels=(1, 2),
    mid_attn=True,
    hit_scales=7,
)
VAR_ARCH = VARArch(
    num_classes=3,
    depth=2,
    width=64,
    num_heads=1,
    scales=SCALES,
    codebook_size=37,
    code_dim=5,
    l2_norm=True,
    shared_adaln=False,
)
VAR_ARCHS = [
    VAR_ARCH,
    dataclasses.replace(VAR_ARCH, l2_norm=False, width=128, num_heads=2),  # heads from the width
    dataclasses.replace(VAR_ARCH, shared_adaln=True, depth=1),
    dataclasses.replace(VAR_ARCH, scales=Scales((2,)), num_heads=4),  # one scale, head width 16
    dataclasses.replace(VAR_ARCH, scales=Scales((1, 1, 3))),  # a repeated side
]
VAE_ARCHS = [
    VAE_ARCH,
    dataclasses.replace(VAE_ARCH, attn_levels=(), mid_attn=False, quant_kernel=1),
    dataclasses.replace(VAE_ARCH, ch_mult=(1,), attn_levels=(0,), num_phi=1, hit_scales=0),
]


def block_causal_mask(scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
    """The buffer as upstream stores it, by a double loop."""
    levels = scales.scale_of_L().tolist()
    rows = [[0.0 if query >= key else -torch.inf for key in levels] for query in levels]
    return torch.tensor(rows, dtype=dtype)[None, None]


def var_state(arch: VARArch = VAR_ARCH) -> State:
    model = VAR(arch)
    randomize(model, torch.Generator().manual_seed(0))
    return {**model.state_dict(), MASK: block_causal_mask(arch.scales)}


def vae_state(arch: VQVAEArch = VAE_ARCH) -> State:
    model = VQVAE(arch, SCALES)
    model.randomize(torch.Generator().manual_seed(0))
    return dict(model.state_dict())


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def one_line(error: Any, *words: str) -> str:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message
