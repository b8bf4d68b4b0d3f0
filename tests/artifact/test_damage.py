"""Whatever is wrong with an artifact is one line that names the file, and never a model.

Damage that a hash would find is also forged with hashes that fit, so that every check is met.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import varptq
from varptq.artifact import load, save
from varptq.errors import ArtifactError, ConfigError, InputError
from varptq.quant.pipeline import QuantizedPipeline

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Forge = Callable[..., Path]
# What a hostile config may cost before it is refused.
SECONDS = 30


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(ArtifactError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    assert str(folder) in message
    assert all(part in message for part in parts), message


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def test_a_forged_artifact_without_changes_loads(forge: Forge) -> None:
    load(forge())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_truncated_file_is_refused(copied: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    draw = random.Random(0)
    # The last byte of config.json is a newline, which JSON does not need.
    whole = len(content) - (name == CONFIG)
    for length in [0, 1, 7, 8, 9, whole - 1, *(draw.randrange(whole) for _ in range(10))]:
        (copied / name).write_bytes(content[:length])
        refused(copied, name)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_flipped_bit_is_refused(copied: Path, pristine: Path, name: str) -> None:
    content = (copied / name).read_bytes()
    draw = random.Random(1)
    for position in [0, 8, len(content) // 2, *(draw.randrange(len(content)) for _ in range(20))]:
        altered = bytearray(content)
        altered[position] ^= 1 << draw.randrange(8)
        if name == CONFIG and same_json(altered, content):
            continue
        (copied / name).write_bytes(altered)
        refused(copied)


def same_json(a: bytes | bytearray, b: bytes) -> bool:
    """Whether only white space differs."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_bytes_behind_the_end_are_refused(copied: Path) -> None:
    with (copied / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    refused(copied, WEIGHTS, "bytes")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    refused(copied, name, "is missing")
    (copied / name).mkdir()
    refused(copied, name, "is not a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_pipe_is_not_waited_for(copied: Path, name: str) -> None:
    (copied / name).unlink()
    os.mkfifo(copied / name)
    refused(copied, name, "is not a file")


def test_a_path_that_is_no_folder_is_refused(copied: Path) -> None:
    refused(copied / CONFIG, "is a file, expected a folder")
    refused(copied / "nowhere", "no such folder")


@pytest.mark.parametrize(
    ("version", "hint"),
    [
        (3, "update varptq"),
        (1, "quantize the model again"),
        (0, "quantize the model again"),
        (-1, "quantize"),
        (10**30, "update"),
    ],
)
def test_another_version_is_refused(forge: Forge, version: int, hint: str) -> None:
    refused(forge(lambda c: c.update(format_version=version)), CONFIG, "format_version", hint)


@pytest.mark.parametrize("version", [None, "1", 1.0, True, [1]])
def test_a_version_that_is_no_number_is_refused(forge: Forge, version: Any) -> None:
    refused(forge(lambda c: c.update(format_version=version)), CONFIG, "not an artifact")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"format_version": NaN}',
        b'{"model_type": "llama"}',
        b"[" * 100_000,
        b'{"format_version": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_config_that_is_something_else_is_refused(copied: Path, text: bytes) -> None:
    (copied / CONFIG).write_bytes(text)
    refused(copied, CONFIG)


def test_a_huge_config_is_not_read(copied: Path) -> None:
    with (copied / CONFIG).open("ab") as file:
        file.truncate(2**40)
    refused(copied, CONFIG, "larger than")


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field, given as "a.b.c"."""

    def change(document: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            document = document[parent]
        document[name] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 3),
        ("class_names", ["a"]),
        ("unknown", 1),
        ("architecture", {}),
        ("architecture.transformer.depth", 0),
        ("architecture.transformer.depth", 10**9),
        ("architecture.transformer.width", 10**12),
        ("architecture.transformer.num_heads", 3),
        ("architecture.transformer.scales", []),
        ("architecture.transformer.scales", [1, -2]),
        ("architecture.transformer.scales", [1] * 1000),
        ("architecture.transformer.codebook_size", 38),
        ("architecture.autoencoder.ch", 33),
        ("architecture.autoencoder.ch_mult", []),
        ("architecture.autoencoder.attn_levels", [2]),
        ("quantization_config.format", "dense"),
        ("quantization_config.ignore", ["transformer.head"]),
        ("varptq.theta", 0),
        ("varptq.theta", "1e400"),
        ("varptq.config.linear.weight.num_bits", 9),
        ("varptq.config.linear.weight.num_bits", 3),
        ("varptq.config.linear.weight.group_size", 64),
        ("varptq.config.rules", [{"targets": "nothing.*", "weight": None}]),
        ("varptq.config.attention.policy", "cache"),
        ("sources", []),
        ("sizes", None),
    ],
)
def test_a_field_that_cannot_be_is_refused(forge: Forge, path: str, value: Any) -> None:
    refused(forge(put(path, value)), CONFIG)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("architecture.transformer.num_classes", 4),
        ("architecture.transformer.depth", 2),
        ("architecture.transformer.l2_norm", False),
        ("architecture.transformer.scales", [1, 2, 4]),
        ("architecture.autoencoder.hit_scales", 3),
        ("architecture.autoencoder.num_res_blocks", 2),
    ],
)
def test_tensors_of_another_model_are_refused(forge: Forge, path: str, value: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        put(path, value)(document)
        document["class_names"] = []
        if path.endswith("depth"):
            widen(document)

    refused(forge(change), "tensor")


def widen(document: dict[str, Any]) -> None:
    """Let the block of compressed-tensors speak of two layers of everything."""
    for group in document["quantization_config"]["config_groups"].values():
        blocks = [t for t in group["targets"] if ".blocks.0." in t]
        place = group["targets"].index(blocks[-1]) + 1 if blocks else 0
        group["targets"][place:place] = [t.replace(".0.", ".1.", 1) for t in blocks]


@pytest.mark.parametrize(
    ("path", "value"),
    [("varptq.theta", 0.25), ("name", "other"), ("varptq.seed", 1), ("sources.var", "0" * 64)],
)
def test_a_plausible_edit_of_the_config_is_refused(copied: Path, path: str, value: Any) -> None:
    document = json.loads((copied / CONFIG).read_text())
    put(path, value)(document)
    (copied / CONFIG).write_text(json.dumps(document))
    refused(copied, CONFIG, "altered")


def test_the_layout_of_the_config_does_not_matter(copied: Path) -> None:
    document = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps(dict(reversed(document.items()))))
    load(copied)


def test_the_config_of_another_artifact_is_refused(
    copied: Path, tmp_path: Path, quantized: QuantizedPipeline
) -> None:
    quantized.seed += 1
    try:
        other = save(quantized, tmp_path / "other")
    finally:
        quantized.seed -= 1
    shutil.copy(other / CONFIG, copied / CONFIG)
    refused(copied, WEIGHTS, "SHA-256")


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def edit(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def spoil(position: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[position] = value
        return tensor

    return change


PROJ = "transformer.blocks.0.attn.proj."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop(PROJ + "weight_packed"), "is missing"),
        (drop("autoencoder.quant_conv.bias"), "is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not belong to the model"),
        (edit(PROJ + "weight_packed", lambda t: t[:, :-1]), "asks for"),
        (edit(PROJ + "weight_packed", lambda t: t.long()), "asks for"),
        (edit(PROJ + "weight_scale", lambda t: t.bfloat16()), "asks for"),
        (edit(PROJ + "weight_scale", lambda t: t.t()), "asks for"),
        (edit(PROJ + "bias", lambda t: t.int()), "asks for"),
        (edit(PROJ + "weight_shape", lambda t: t + 1), "weight_shape"),
        (edit(PROJ + "weight_scale", spoil(0, 0.0)), "not positive"),
        (edit(PROJ + "weight_scale", spoil(0, -1.0)), "not positive"),
        (edit(PROJ + "weight_scale", spoil(0, float("nan"))), "NaN or infinity"),
        (edit(PROJ + "bias", spoil(0, float("inf"))), "NaN or infinity"),
        (edit("autoencoder.quantize.embedding.weight", spoil(0, float("nan"))), "NaN or infinity"),
        (edit("transformer.lvl_1L", spoil(0, 9)), "contradicts the scales"),
        # 37 rows of 4 bits leave three nibbles of the last word free.
        (edit("transformer.head.weight_zero_point", spoil(-1, -1)), "bits set after its last code"),
    ],
)
def test_tensors_that_save_never_writes_are_refused(
    forge: Forge, change: Callable[[dict[str, Tensor]], object], reason: str
) -> None:
    refused(forge(tensors=change), WEIGHTS, reason)


def test_a_foreign_safetensors_file_is_refused(copied: Path) -> None:
    document = json.loads((copied / CONFIG).read_text())
    save_file({"x": torch.zeros(3)}, copied / WEIGHTS)
    refused(copied, WEIGHTS, "truncated or of another artifact")
    document["files"][WEIGHTS]["bytes"] = (copied / WEIGHTS).stat().st_size
    (copied / CONFIG).write_text(json.dumps(document))
    refused(copied, WEIGHTS, "is missing")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**31) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a":{}}\n',
        struct.pack("<Q", 72)
        + b'{"transformer.pos_start":{"dtype":"F32","shape":[1,1,128],"data_offsets":[0,9]}}',
    ],
)
def test_a_hostile_header_is_refused(copied: Path, header: bytes) -> None:
    document = json.loads((copied / CONFIG).read_text())
    (copied / WEIGHTS).write_bytes(header)
    document["files"][WEIGHTS]["bytes"] = len(header)
    (copied / CONFIG).write_text(json.dumps(document))
    refused(copied, WEIGHTS)


def test_pickled_code_does_not_run(copied: Path, tmp_path: Path) -> None:
    # A protocol-0 pickle that would call os.mkdir.
    pickled = f"cos\nmkdir\n(S'{tmp_path}/ran'\ntR.".encode()
    document = json.loads((copied / CONFIG).read_text())
    (copied / WEIGHTS).write_bytes(pickled)
    document["files"][WEIGHTS]["bytes"] = len(pickled)
    (copied / CONFIG).write_text(json.dumps(document))
    refused(copied, WEIGHTS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_the_largest_model_a_config_can_ask_for_is_refused_soon(forge: Forge) -> None:
    def change(document: dict[str, Any]) -> None:
        document["class_names"] = []
        document["architecture"]["transformer"].update(
            depth=128, width=2**20, num_heads=1, scales=[1024] * 64, num_classes=2**20
        )
        document["architecture"]["autoencoder"].update(
            ch=2**13, ch_mult=[128] * 10, num_res_blocks=8, hit_scales=256
        )
        for name in ("transformer", "autoencoder"):
            network = document["architecture"][name]
            network.update(codebook_size=2**20, code_dim=2**20)

    started = time.process_time()
    refused(forge(change))
    assert time.process_time() - started < SECONDS


def test_a_bad_argument_is_found_before_anything_is_read(pristine: Path) -> None:
    with pytest.raises(InputError, match="runtime 'gpu': unknown"):
        varptq.load(pristine.parent / "nowhere", runtime="gpu")
    with pytest.raises(ConfigError, match="expected a floating dtype"):
        load(pristine, dtype=torch.int32)


def test_forged_weights_without_the_seal_of_the_config_are_refused(forge: Forge) -> None:
    folder = forge()
    document = json.loads((folder / CONFIG).read_text())
    document["varptq"]["seed"] = 5
    (folder / CONFIG).write_text(json.dumps(document))
    refused(folder, CONFIG, "was saved with")
