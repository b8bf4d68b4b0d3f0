"""Presets: the bundled demo model, the hub's cache, and one line when a file cannot be had."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helpers.hub_server import Client
from varptq.errors import CheckpointError, InputError
from varptq.models.pipeline import build_model, load_model
from varptq.models.presets import PRESETS, preset, resolve
from varptq.models.var.checkpoint import check_pair, infer_var, infer_vqvae, read_state
from varptq.models.var.presets import HUB_REPO

OF_VAR = [name for name, entry in PRESETS.items() if entry.family == "var"]
RELEASED = [name for name in OF_VAR if PRESETS[name].repo]
COMMIT = "0" * 40


def hub_folder(cache: Path) -> Path:
    return cache / f"models--{HUB_REPO.replace('/', '--')}"


def put(cache: Path, file: str, content: bytes, etag: str) -> Path:
    """A file as the hub's library lays it out: a link in a snapshot to a blob named by its etag."""
    folder = hub_folder(cache)
    for part in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs" / etag).write_bytes(content)
    link = folder / "snapshots" / COMMIT / file
    link.symlink_to(Path("../../blobs") / etag)
    return link


def test_demo_files_are_what_the_preset_says() -> None:
    entry = preset("demo")
    var_path, vae_path = resolve("demo")
    assert infer_var(read_state(var_path, "var")) == entry.transformer_arch
    assert infer_vqvae(read_state(vae_path, "vae")) == entry.autoencoder_arch
    assert entry.class_names is not None
    assert len(entry.class_names) == entry.transformer_arch.num_classes


@pytest.mark.parametrize("name", OF_VAR)
def test_every_preset_is_a_pair(name: str) -> None:
    entry = preset(name)
    assert entry.name == name
    check_pair(entry.transformer_arch, entry.autoencoder_arch)
    assert entry.transformer_arch.width % entry.transformer_arch.num_heads == 0


def test_released_architectures() -> None:
    assert RELEASED == ["var-d16", "var-d20", "var-d24", "var-d30", "var-d36"]
    for name in RELEASED:
        entry = preset(name)
        arch, depth = entry.transformer_arch, int(name.removeprefix("var-d"))
        assert (arch.depth, arch.num_heads, arch.head_width) == (depth, depth, 64)
        assert arch.shared_adaln == (depth == 36)
        assert arch.scales.num_tokens == (2240 if depth == 36 else 680)
        pixels = arch.scales.last[0] * entry.autoencoder_arch.downsampling
        assert pixels == (512 if depth == 36 else 256)
        assert entry.transformer_file == f"var_d{depth}.pth"


def test_a_preset_in_shards_wants_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, shards = "model.safetensors.index.json", ["model-1.safetensors", "model-2.safetensors"]
    entry = dataclasses.replace(preset("var-d16"), transformer_file=index)
    monkeypatch.setitem(PRESETS, "var-d16", entry)
    weight_map = {f"tensor{i}": shard for i, shard in enumerate(shards)}
    found = put(tmp_path, index, json.dumps({"weight_map": weight_map}).encode(), "index")
    put(tmp_path, entry.autoencoder_file, b"vae", "vae")
    put(tmp_path, shards[0], b"first", "first")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors of .* is not in"):
        resolve("var-d16", cache_dir=tmp_path)
    put(tmp_path, shards[1], b"second", "second")
    assert resolve("var-d16", cache_dir=tmp_path)[0] == found


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    for call in (preset, resolve):
        with pytest.raises(InputError) as caught:
            call("vard16")
        message = str(caught.value)
        assert "\n" not in message
        assert "'vard16'" in message
        assert "did you mean 'var-d16'?" in message
        assert all(name in message for name in PRESETS)


@pytest.mark.parametrize("name", RELEASED)
def test_not_cached_is_one_line_that_says_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(name, cache_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert "download=True (--download)" in message


def test_cached_files_need_no_network(tmp_path: Path) -> None:
    entry = preset("var-d16")
    expected = tuple(
        put(tmp_path, file, file.encode(), f"etag-{file}")
        for file in (entry.transformer_file, entry.autoencoder_file)
    )
    assert resolve("var-d16", cache_dir=tmp_path) == expected
    assert resolve("var-d16", download=True, cache_dir=tmp_path) == expected


RESOLVE = """
from varptq.errors import CheckpointError
from varptq.models.presets import resolve
try:
    print(*resolve("var-d20", download=True), sep="\\n")
except CheckpointError as error:
    print(error)
"""


def published(hub: Client, name: str = "var-d20") -> dict[str, bytes]:
    entry = preset(name)
    files = {entry.transformer_file: b"var" * 99, entry.autoencoder_file: b"vae" * 99}
    hub.hub.add(HUB_REPO, files)
    return files


def test_download_fetches_what_is_missing_and_keeps_it(hub: Client) -> None:
    files = published(hub)
    first = hub.python(RESOLVE)
    assert [Path(path).read_bytes() for path in first] == list(files.values())
    hub.hub.asked.clear()
    assert hub.python(RESOLVE, HF_HUB_OFFLINE="1") == first
    assert not hub.hub.asked


def test_damaged_download_is_refused_and_removed(hub: Client) -> None:
    published(hub)
    hub.hub.damage = lambda content: content[:-1] + b"?"
    (line,) = hub.python(RESOLVE)
    assert "var_d20.pth arrived damaged (SHA-256 is not" in line and not hub.blobs()


def test_what_cannot_be_had_is_one_line(hub: Client) -> None:
    (line,) = hub.python(RESOLVE)
    assert line == (
        f"{HUB_REPO}: no such repository, or a private one; check the name, or set HF_TOKEN, or "
        "run hf auth login, or give files"
    )
    (line,) = hub.python(RESOLVE, HF_HUB_OFFLINE="1")
    assert "var_d20.pth" in line and "HF_HUB_OFFLINE" in line


def test_the_text_demo_reads_strings_and_has_its_own_pool() -> None:
    entry = preset("demo-text")
    pipe = load_model("demo-text")
    assert pipe.var.arch == entry.transformer_arch and pipe.vae.arch == entry.autoencoder_arch
    assert pipe.vae.image_size == (32, 32) and pipe.scales == entry.size
    pool = pipe.pool()
    assert tuple(pool.titles()) == entry.class_names and len(set(pool.titles())) == len(pool) == 200
    assert pipe.prompts(["a dark photo of a blue car"]).titles() == ["a dark photo of a blue car"]
    # An artifact of this model finds its encoder and pool by the name.
    assert pool.sha256() == build_model("demo-text").pool().sha256()
    size = sum(path.stat().st_size for path in resolve("demo-text"))
    assert size < 15e6
