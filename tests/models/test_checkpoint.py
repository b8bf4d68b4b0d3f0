"""Checkpoint files and architectures: round trips, one line for every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from varptq.errors import CheckpointError, NonFiniteError, VarptqError
from varptq.models.checkpoint import (
    check_pair,
    file_sha256,
    infer_var,
    infer_vqvae,
    load_strict,
    read_state,
)
from varptq.models.scales import Scales
from varptq.models.var import VAR, VARArch, randomize
from varptq.models.vqvae import VQVAE, VQVAEArch

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


class RunsCode:
    """Unpickled by a careless reader, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


# Reading


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    state, path = var_state(), tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = read_state(path, "var")
    assert set(found) == set(state)
    assert_same({name: found[name] for name in state}, state)


def test_legacy_format(tmp_path: Path) -> None:
    state = vae_state()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_state(tmp_path / "old.pth", "vae"), state)


def test_trainer_checkpoint_holds_both_parts(tmp_path: Path) -> None:
    var, vae = var_state(), vae_state()
    trainer = {"var_wo_ddp": var, "vae_local": vae, "var_opt": {"step": 3}}
    torch.save({"epoch": 1, "trainer": trainer, "args": {"lr": 0.1}}, tmp_path / "run.pth")
    assert_same(read_state(tmp_path / "run.pth", "var"), var)
    assert_same(read_state(tmp_path / "run.pth", "vae"), vae)


def test_trainer_checkpoint_without_the_part(tmp_path: Path) -> None:
    torch.save({"trainer": {"var_wo_ddp": var_state()}}, tmp_path / "run.pth")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "run.pth", "vae")
    one_line(caught, "'vae_local'", "var_wo_ddp")


def test_plain_wrapping(tmp_path: Path) -> None:
    state = vae_state()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    assert_same(read_state(tmp_path / "model.ckpt", "vae"), state)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_floats_are_converted_and_integers_kept(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    state = {
        name: tensor.to(stored) if tensor.is_floating_point() else tensor
        for name, tensor in var_state().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    found = read_state(tmp_path / "model.safetensors", "var", dtype=wanted)
    for name, tensor in state.items():
        expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_do_not_depend_on_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    state = {"a": torch.arange(5000.0), "b": torch.arange(3)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = read_state(path, "vae")
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(found, state)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.pth", "no such"), (tmp_path, "is not a file")):
        with pytest.raises(CheckpointError) as caught:
            read_state(path, "var")
        one_line(caught, str(path), reason)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"h", b"hello, world\n" * 99, b"\x80", b"\0" * 64])
def test_foreign_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state(path, "var")
    one_line(caught, str(path))


def test_foreign_archive_and_suffix(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.pth", "w") as archive:
        archive.writestr("notes.txt", "no tensors here")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "notes.pth", "var")
    one_line(caught, "notes.pth")
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "model.onnx", "var")
    one_line(caught, ".pth", ".safetensors")


@pytest.mark.parametrize("suffix", [".pth", "legacy.pth", ".safetensors"])
@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, fraction: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / f"model{suffix}"
    state = {"a": torch.arange(300.0), "b": torch.arange(7)}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(CheckpointError) as caught:
        read_state(path, "var")
    one_line(caught, str(path))


def test_flipped_bit_in_an_archive(tmp_path: Path) -> None:
    """torch's own reader would return the wrong number."""
    path = tmp_path / "model.pth"
    torch.save({"a": torch.full((300,), 1.25)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((9,), 1.25).numpy().tobytes()) + 6] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state(path, "var")
    one_line(caught, "checksum")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    payload = {"a": torch.zeros(3), "b": RunsCode(tmp_path / "ran")}
    torch.save(payload, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "evil.pth", "var")
    one_line(caught, "evil.pth", "mkdir", "expected tensors only")
    assert not (tmp_path / "ran").exists()


def test_plain_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"b": RunsCode(tmp_path / "ran")}))
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "evil.pth", "var")
    one_line(caught, "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        {},
        {"a": torch.zeros(2), "b": [1, 2]},
        {3: torch.zeros(2)},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(1).expand(10**9)},  # gigabytes out of four bytes
        {"a": torch.zeros(2, dtype=torch.complex64)},
    ],
    ids=["list", "tensor", "empty", "extra", "key", "sparse", "expanded", "complex"],
)
def test_content_other_than_named_dense_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path / "model.pth", "var")
    one_line(caught, "model.pth")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_tensor_is_named(tmp_path: Path, bad: float) -> None:
    state = vae_state()
    state["quant_conv.weight"][0, 0, 0, 0] = bad
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(NonFiniteError) as caught:
        read_state(tmp_path / "model.pth", "vae")
    one_line(caught, "model.pth", "'quant_conv.weight'")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_mask_may_hold_minus_infinity_only(tmp_path: Path, bad: float) -> None:
    state = var_state()
    state[MASK][0, 0, 0, 0] = bad
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(NonFiniteError) as caught:
        read_state(tmp_path / "model.pth", "var")
    one_line(caught, MASK)


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointError) as caught:
        file_sha256(tmp_path / "none")
    one_line(caught, "none")


# Architecture


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
