"""Checkpoint files: round trips, and one line for every way a file can be wrong."""

from __future__ import annotations

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

from helpers.checkpoint_states import (
    MASK,
    assert_same,
    one_line,
    vae_state,
    var_state,
)
from varptq.errors import CheckpointError, NonFiniteError
from varptq.models.var.checkpoint import (
    file_sha256,
    read_state,
)


class RunsCode:
    """Unpickled by a careless reader, this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


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


@pytest.mark.parametrize("length", [128, 640])
def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    for letters in range(length):
        state = {"a" * letters: torch.ones(2)}
        save_file(state, path)
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    assert path.read_bytes()[0] == 0x80
    assert_same(read_state(path), state)


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
