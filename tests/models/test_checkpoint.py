"""Architectures read off tensors, strict loading, and one line for every misfit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from helpers.checkpoint_states import (
    MASK,
    SCALES,
    VAE_ARCH,
    VAE_ARCHS,
    VAR_ARCH,
    VAR_ARCHS,
    State,
    assert_same,
    block_causal_mask,
    one_line,
    vae_state,
    var_state,
)
from varptq.errors import CheckpointError, VarptqError
from varptq.models.scales import Scales
from varptq.models.var.checkpoint import (
    check_pair,
    infer_var,
    infer_vqvae,
    load_strict,
)
from varptq.models.var.transformer import VAR, VARArch
from varptq.models.var.vqvae import VQVAE, VQVAEArch


@pytest.mark.parametrize("arch", VAR_ARCHS)
def test_var_architecture_round_trip(arch: VARArch) -> None:
    assert infer_var(var_state(arch)) == arch


@pytest.mark.parametrize("arch", VAE_ARCHS)
def test_vqvae_architecture_round_trip(arch: VQVAEArch) -> None:
    assert infer_vqvae(vae_state(arch)) == arch


def test_inference_under_the_meta_device() -> None:
    """Models are built without memory around the call; the tensors read are real all the same."""
    var, vae = var_state(), vae_state()
    with torch.device("meta"):
        assert infer_var(var) == VAR_ARCH
        assert infer_vqvae(vae) == VAE_ARCH


def test_swapped_files_say_so() -> None:
    with pytest.raises(CheckpointError) as caught:
        infer_var(vae_state())
    one_line(caught, "is this a VAR checkpoint?")
    with pytest.raises(CheckpointError) as caught:
        infer_vqvae(var_state())
    one_line(caught, "is this a VQVAE checkpoint?")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("lvl_1L", torch.tensor([[0, 1, 1, 1]])),  # three tokens are no square
        ("lvl_1L", torch.tensor([[1, 0, 0, 0, 0]])),  # not in order
        ("lvl_1L", torch.tensor([[0, 2, 2, 2, 2]])),  # skips a level
        ("lvl_1L", torch.zeros(1, 0, dtype=torch.int64)),
        ("lvl_1L", torch.zeros(14, dtype=torch.int64)),
        ("pos_1LC", torch.zeros(1, 13, 64)),
        ("class_emb.weight", torch.zeros(1, 64)),
        ("class_emb.weight", torch.zeros(4, 63)),
        ("blocks.1.attn.mat_qkv.weight", torch.zeros(3, 64)),
        ("blocks.0.attn.scale_mul_1H11", torch.zeros(1, 7, 1, 1)),  # 64 / 7
        ("head.weight", torch.zeros(37)),
        ("word_embed.weight", torch.zeros(64, 0)),
    ],
)
def test_impossible_var_tensors(name: str, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError) as caught:
        infer_var({**var_state(), name: tensor})
    one_line(caught, "VAR", "width" if "scale_mul" in name else name)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("encoder.conv_in.weight", torch.zeros(32, 1, 3, 3)),
        ("encoder.down.1.block.0.conv1.weight", torch.zeros(48, 32, 3, 3)),  # not a multiple
        ("encoder.down.1.block.0.conv1.weight", torch.zeros(64, 33, 3, 3)),
        ("quantize.embedding.weight", torch.zeros(37)),
        ("quant_conv.weight", torch.zeros(5, 4, 3, 3)),
    ],
)
def test_impossible_vqvae_tensors(name: str, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError) as caught:
        infer_vqvae({**vae_state(), name: tensor})
    one_line(caught, "VQVAE", name)


def test_a_gap_in_the_blocks() -> None:
    state = {name.replace("blocks.1.", "blocks.2."): t for name, t in var_state().items()}
    with pytest.raises(CheckpointError) as caught:
        infer_var(state)
    one_line(caught, "blocks.1.")


def test_any_missing_tensor_is_a_checkpoint_error() -> None:
    """Whichever tensor is gone, the chain infer -> build -> load ends in one line."""
    whole = var_state()
    for name in whole:
        if name == MASK:
            continue
        state = {other: tensor for other, tensor in whole.items() if other != name}
        with pytest.raises(CheckpointError) as caught:
            load_strict(VAR(infer_var(state)), state, "VAR")
        one_line(caught, "VAR")


# Loading


def build(state: State) -> nn.Module:
    return VAR(infer_var(state)) if "lvl_1L" in state else VQVAE(infer_vqvae(state), SCALES)


@pytest.mark.parametrize("state", [*map(var_state, VAR_ARCHS), *map(vae_state, VAE_ARCHS)])
def test_strict_load(state: State) -> None:
    module = build(state)
    load_strict(module, state, "model")
    kept = {name: tensor for name, tensor in state.items() if name != MASK}
    assert_same(module.state_dict(), {name: kept[name] for name in module.state_dict()})
    assert set(module.state_dict()) == set(kept)


def test_load_into_a_module_without_memory() -> None:
    state = vae_state()
    with torch.device("meta"):
        module = VQVAE(infer_vqvae(state), SCALES)
    load_strict(module, state, "VQVAE")
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    ids = torch.zeros(1, SCALES.num_tokens, dtype=torch.int64)
    assert module.decode(ids).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_mask_of_either_precision_is_accepted(dtype: torch.dtype) -> None:
    state = {**var_state(), MASK: block_causal_mask(SCALES, dtype)}
    load_strict(build(state), state, "VAR")


def test_mask_is_optional() -> None:
    state = var_state()
    del state[MASK]
    load_strict(build(state), state, "VAR")


@pytest.mark.parametrize(
    "mask",
    [
        block_causal_mask(SCALES).transpose(-1, -2),
        torch.zeros(1, 1, 14, 14),
        block_causal_mask(Scales((1, 3, 2))),
        block_causal_mask(Scales((1, 2))),
        block_causal_mask(SCALES).clamp_min(-1e4),
    ],
    ids=["transposed", "zeros", "other order", "other size", "finite"],
)
def test_wrong_mask(mask: Tensor) -> None:
    state = {**var_state(), MASK: mask}
    with pytest.raises(CheckpointError) as caught:
        load_strict(VAR(VAR_ARCH), state, "VAR")
    one_line(caught, MASK, "block-causal")


def test_first_misfit_is_named() -> None:
    whole = vae_state()
    missing = {name: t for name, t in whole.items() if name != "decoder.conv_in.bias"}
    cases: list[tuple[State, tuple[str, ...]]] = [
        (missing, ("'decoder.conv_in.bias'", "missing")),
        ({**whole, "extra.weight": torch.zeros(1)}, ("'extra.weight'", "unexpected")),
        ({**whole, "decoder.conv_in.bias": torch.zeros(3)}, ("(3,)", "expected (32,)")),
        (
            {**whole, "decoder.conv_in.bias": torch.zeros(32, dtype=torch.int8)},
            ("torch.int8", "expected floating point"),
        ),
    ]
    for state, words in cases:
        with pytest.raises(CheckpointError) as caught:
            load_strict(build(whole), state, "vae.pth")
        one_line(caught, "vae.pth", *words)


def test_index_buffer_stored_as_float_stays_an_index() -> None:
    state = var_state()
    state["lvl_1L"] = state["lvl_1L"].half()
    module = build(state)
    load_strict(module, state, "VAR")
    assert module.lvl_1L.dtype == torch.int64


def test_pair() -> None:
    check_pair(VAR_ARCH, VAE_ARCH)
    with pytest.raises(VarptqError) as caught:
        check_pair(VAR_ARCH, dataclasses.replace(VAE_ARCH, codebook_size=38))
    one_line(caught, "codebook size", "37", "38")
    with pytest.raises(VarptqError) as caught:
        check_pair(VAR_ARCH, dataclasses.replace(VAE_ARCH, code_dim=6))
    one_line(caught, "code width", "5", "6")
