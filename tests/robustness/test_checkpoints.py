"""Checkpoints as people have them: each loads to the same numbers, or says in one line which file
it is, what is the matter and what to do."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.checkpoint_states import (
    MASK,
    VAE_ARCHS,
    State,
    assert_same,
    one_line,
    vae_state,
    var_state,
)
from varptq.errors import CheckpointError, NonFiniteError
from varptq.models.pipeline import load_model

VAR, VAE = var_state(), vae_state(VAE_ARCHS[2])
PREFIXES = (
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "var.", "model.var.",
    "module.model.", "_fsdp_wrapped_module.", "ema_model.module.",
)  # fmt: skip


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def inside(state: State, wrapper: str) -> State:
    """As wrapping every block of a model names its tensors."""
    return {n.replace(".attn.", f".{wrapper}.attn."): tensor for n, tensor in state.items()}


WRAPPED: dict[str, Any] = {
    "a model": {"model": VAR, "epoch": 3},
    "its average alone": {"ema": VAR, "args": {"lr": 1e-4}},
    "Lightning": {"state_dict": prefixed(VAR, "var."), "pytorch-lightning_version": "2.0"},
    "Lightning with both": {
        "state_dict": {**prefixed(VAR, "var."), **prefixed(VAE, "vae."), "loss.w": torch.ones(2)}
    },
    "both in one dict": {**VAR, **VAE},
    "the VQVAE inside": {**VAR, **prefixed(VAE, "vae_proxy.")},
    "VAR's trainer": {
        "epoch": 1,
        "trainer": {"var_wo_ddp": VAR, "vae_local": VAE, "var_opt": {"state": {0: VAR}}},
    },
    "VAR's trainer under DDP": {
        "trainer": {"var": prefixed(VAR, "module."), "vae_wo_ddp": prefixed(VAE, "module.")}
    },
    "a deep dict": {"a": {"b": {"c": {"model": VAR}}}},
    "moments by name": {"model": VAR, "optimizer": {"exp_avg": VAR, "param_groups": [{"lr": 0.1}]}},
    "torch's averaged model": {**prefixed(VAR, "module."), "n_averaged": torch.tensor(7)},
    "one dict twice": {"model": VAR, "ema": VAR},
    "parts wrapped": prefixed(inside(VAR, "_checkpoint_wrapped_module"), "_fsdp_wrapped_module."),
    "parts compiled": inside(VAR, "_orig_mod"),
    "parameters": {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in VAR.items()},
    "without the mask": {name: tensor for name, tensor in VAR.items() if name != MASK},
    "without levels": {name: tensor for name, tensor in VAR.items() if name != "lvl_1L"},
    "without the keys' bias": {n: t for n, t in VAR.items() if not n.endswith("zero_k_bias")},
    "transposed in memory": {n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in VAR.items()},
    "views of one storage": {n: torch.stack((t, t))[1] for n, t in VAR.items()},
}  # fmt: skip


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "vae.pth"
    torch.save(VAE, path)
    return path


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_loads(path: Path, vae_file: Path) -> None:
    found = load_model(var=path, vae=vae_file).var.state_dict()
    assert_same(found, {name: VAR[name] for name in found})
    assert all(tensor.is_contiguous() for tensor in found.values())


def assert_refused(path: Path, vae_file: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(var=path, vae=vae_file)
    one_line(caught, path.name, *words)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix: str, tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    counted()
    assert_loads(saved(prefixed(VAR, prefix), tmp_path / "var.pth"), vae_file)
    save_file(prefixed(VAE, prefix), tmp_path / "vae.safetensors")
    found = load_model(var=tmp_path / "var.pth", vae=tmp_path / "vae.safetensors").vae.state_dict()
    assert_same(found, {name: VAE[name] for name in found})


@pytest.mark.parametrize("what", WRAPPED)
def test_wrappers(what: str, tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    counted()
    assert_loads(saved(WRAPPED[what], tmp_path / "var.pth"), vae_file)


@pytest.mark.slow
def test_one_file_for_both(tmp_path: Path, counted: Callable[[], None]) -> None:
    for what in ("Lightning with both", "both in one dict", "VAR's trainer under DDP"):
        counted()
        path = saved(WRAPPED[what], tmp_path / "run.pth")
        found = load_model(var=path, vae=path)
        assert_same(found.vae.state_dict(), {n: VAE[n] for n in found.vae.state_dict()})


AVERAGE = {name: tensor + 1 for name, tensor in VAR.items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": VAR, "ema": AVERAGE}, ("'model' and 'ema'", "content['ema']", "torch.save")),
        ({"trainer": {"var_wo_ddp": VAR, "var_ema": AVERAGE}}, ("'trainer.var_ema'",)),
        ({**prefixed(VAR, "online_model."), **prefixed(AVERAGE, "ema_model.")}, ("'ema_model.'",)),
        ({**VAR, **prefixed(AVERAGE, "ema.")}, ("'ema'",)),
        ({**VAR, "_orig_mod.pos_start": AVERAGE["pos_start"]}, ("'_orig_mod.pos_start'", "both")),
        ({"model": VAE}, ("VQVAE", "'model'", "vae=")),
        (VAE, ("VQVAE", "vae=")),
        ({"trainer": {"vae_wo_ddp": VAE}}, ("'trainer.vae_wo_ddp'", "'var_wo_ddp'")),
        ({n: t for n, t in VAR.items() if n not in ("lvl_1L", MASK)}, ("'lvl_1L'", "add")),
        ({n: t for n, t in VAR.items() if n != "word_embed.bias"}, ("'word_embed.bias'",)),
        ({**VAR, "blocks.0.lora_A": VAR["pos_start"]}, ("'blocks.0.lora_A'", "unexpected")),
        ({**prefixed(VAR, "var."), "var.head.weight_packed": torch.ones(1)}, ("varptq.load",)),
        ({n: t.to("meta") for n, t in VAR.items()}, ("meta",)),
        ({n: t.to(torch.int8) for n, t in VAR.items()}, ("torch.int8", "floating")),
    ],
)  # fmt: skip
def test_what_is_not_plain(
    content: Any, words: tuple[str, ...], tmp_path: Path, vae_file: Path,
    counted: Callable[[], None],
) -> None:  # fmt: skip
    counted()
    assert_refused(saved(content, tmp_path / "run.pth"), vae_file, *words)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_stored_dtypes(
    dtype: torch.dtype, tmp_path: Path, vae_file: Path, counted: Callable[[], None]
) -> None:
    counted()
    stored = {n: t.to(dtype) if t.is_floating_point() and n != MASK else t for n, t in VAR.items()}
    found = load_model(var=saved(stored, tmp_path / "var.pth"), vae=vae_file).var.state_dict()
    assert_same(found, {n: stored[n].to(VAR[n].dtype) for n in found})


def test_double_beyond_float32(tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    counted()
    state = {n: t.double() for n, t in VAR.items()}
    state["head.weight"][0, 0] = 1e300
    with pytest.raises(NonFiniteError) as caught:
        load_model(var=saved(state, tmp_path / "var.pth"), vae=vae_file)
    one_line(caught, "var.pth", "'head.weight'", "torch.float32")


def bytes_of(state: State) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def zipped(members: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def zipped_again(content: bytes, kind: int) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, kind)


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("var.pth")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def arrays(state: State) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    return file.getvalue()


def script() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


PTH = bytes_of(VAR)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>404</title></html>" + b" " * 2000
FOREIGN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "git-lfs pointer": (LFS, ("git-lfs pointer", "git lfs pull")),
    "web page": (PAGE, ("web page", "download")),
    "text": (b"Invalid username or password.", ("text", "Invalid username")),
    "nothing": (b"", ("is empty",)),
    "zeros": (bytes(5000), ("zeros",)),
    "half a download": (PTH[: len(PTH) // 2], ("truncated", "download it again")),
    "gzip": (gzip.compress(PTH), ("gzip", "gunzip")),
    "tar": (tarred(PTH), ("tar archive",)),
    "zip around it": (zipped({"var.pth": PTH}), ("zip archive of 'var.pth'", "unpack")),
    "zip with nothing": (zipped({}), ("zip archive of nothing",)),
    "zipped again": (zipped_again(PTH, zipfile.ZIP_DEFLATED), ("zipped again", "deflate")),
    "numpy arrays": (arrays(VAR), ("numpy", "torch.from_numpy")),
    "a program": (script(), ("TorchScript", "state_dict()")),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_another_kind(
    what: str, suffix: str, tmp_path: Path, vae_file: Path, counted: Callable[[], None]
) -> None:
    counted()
    content, words = FOREIGN[what]
    path = tmp_path / f"var{suffix}"
    path.write_bytes(content)
    assert_refused(path, vae_file, *words)


def test_kinds_under_another_name(
    tmp_path: Path, vae_file: Path, counted: Callable[[], None]
) -> None:
    save_file(VAR, tmp_path / "x")
    safetensors = (tmp_path / "x").read_bytes()
    old = io.BytesIO()
    torch.save(VAR, old, _use_new_zipfile_serialization=False)
    stored = zipped_again(PTH, zipfile.ZIP_STORED)
    for name, content in {
        "var.pth": safetensors, "var.bin": safetensors, "model": safetensors,
        "var.safetensors": PTH, "checkpoint.pth.tar": PTH, "model.ckpt": old.getvalue(),
        "old.safetensors": old.getvalue(), "plain_zip.pth": stored,
    }.items():  # fmt: skip
        counted()
        (tmp_path / name).write_bytes(content)
        assert_loads(tmp_path / name, vae_file)


def sharded(folder: Path, suffix: str = ".safetensors") -> Path:
    """VAR in three shards and an index, as the hub's libraries write them."""
    folder.mkdir(exist_ok=True)
    names, weight_map = sorted(VAR), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003{suffix}"
        part = {name: VAR[name] for name in names[i::3]}
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(
            part, folder / file
        )
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(suffix: str, tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    """The index or its folder; the record of where the weights came from covers every shard."""
    index = sharded(tmp_path / "m", suffix)
    digests = set()
    for path in (index, index.parent):
        counted()
        assert_loads(path, vae_file)
        digests.add(load_model(var=path, vae=vae_file).sources["var"])
    assert len(digests) == 1
    shard = index.parent / f"model-00002-of-00003{suffix}"
    changed = {n: t + 1 for n, t in VAR.items() if n in sorted(VAR)[1::3]}
    save_file(changed, shard)
    assert load_model(var=index, vae=vae_file).sources["var"] not in digests


def edited(index: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_broken_shards(tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    def refused(what: str, breaking: Callable[[Path], object], *words: str) -> None:
        counted()
        index = sharded(tmp_path / what)
        breaking(index)
        with pytest.raises(CheckpointError) as caught:
            load_model(var=index, vae=vae_file)
        one_line(caught, str(index.parent), *words)

    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    name, other = sorted(VAR)[:2]
    refused("missing", lambda i: (i.parent / second).unlink(), second, "missing")
    refused("pointer", lambda i: (i.parent / second).write_bytes(LFS), second, "git-lfs")
    refused("half", lambda i: (i.parent / first).write_bytes(b"\0" * 2000), first, "zeros")
    refused("moved", lambda i: edited(i, lambda m: m.update({name: second})), name)
    refused("dropped", lambda i: edited(i, lambda m: m.pop(other)), other)
    refused("outside", lambda i: edited(i, lambda m: m.update({name: "../x.pth"})), "beside it")
    twice = f'{{"weight_map": {{"{name}": "{first}", "{name}": "{second}"}}}}'
    refused("twice", lambda i: i.write_text(twice), f"{name!r} twice")
    for text in ("", "[1]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 10**5, "\0"):
        refused(f"text {text[:9]!r}".replace("/", ""), lambda i, t=text: i.write_text(t), "index")
    index = sharded(tmp_path / "one")
    assert_refused(index.parent / first, vae_file, "shard 1 of 3", index.name)


def test_folders(tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    """A folder stands for the only checkpoint in it."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    counted()
    assert_refused(folder, vae_file, "is not a file")
    saved(VAR, folder / "var.pth")
    assert_loads(folder, vae_file)
    counted()
    saved(VAE, folder / "vae.pth")
    assert_refused(folder, vae_file, "2 checkpoints (vae.pth, var.pth)", "give one")
    counted()
    distributed = tmp_path / "dcp"
    distributed.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (distributed / name).write_bytes(b"x")
    assert_refused(distributed, vae_file, "distributed checkpoint", "dcp_to_torch")


def test_files_that_are_not_there(
    tmp_path: Path, vae_file: Path, counted: Callable[[], None]
) -> None:
    """A dangling link, as half a cache of the hub has; a name too long for any file; no rights."""
    (tmp_path / "link.pth").symlink_to(tmp_path / "blobs" / "4d7a")
    for path, words in {
        tmp_path / "link.pth": ("link", "not there"),
        tmp_path / ("x" * 300 + ".pth"): (".pth",),
        tmp_path / "link.pth" / "var.pth": ("no such",),
    }.items():
        counted()
        assert_refused(path, vae_file, *words)


def test_exchanged_files(tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    counted()
    var = saved(VAR, tmp_path / "var.pth")
    assert_refused(vae_file, var, "is this a VAR checkpoint?", "vae=")
    with pytest.raises(CheckpointError) as caught:
        load_model(var=var, vae=var)
    one_line(caught, "var.pth", "holds a VAR transformer", "is this a VQVAE checkpoint?")


def nested(depth: int, leaf: Tensor) -> Any:
    content: Any = {"pos_1LC": leaf}
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


def test_dicts_made_to_hurt(tmp_path: Path, vae_file: Path, counted: Callable[[], None]) -> None:
    """Dicts that share their insides are looked at once, and not below what wrappers need."""
    for depth in (4, 60):
        counted()
        path = saved(nested(depth, VAR["pos_1LC"]), tmp_path / "deep.pth")
        assert_refused(path, vae_file)
