"""Every loader on mutated real files: an answer or our own error in one line, in time."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import varptq
from helpers.picture_files import chunk, png_of
from robustness.mutations import in_time, mutated
from varptq import artifact
from varptq.calibrate.config import CalibrationConfig
from varptq.editing.reading import read_mask
from varptq.errors import VarptqError
from varptq.evaluate import statistics
from varptq.evaluate.image_files import ImageFiles
from varptq.models.pipeline import Pipeline, load_model
from varptq.quant.config import QuantConfig
from varptq.reading import read_image

Load = Callable[[Path], Any]
FUZZ = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def calibration_yaml() -> bytes:
    return b"# a calibration\nnum_samples: 64\nsteps: 200\nsampling: {cfg: 1.5, top_k: 900}\n"


def quant_json() -> bytes:
    return json.dumps(QuantConfig.preset("w4a4").to_dict(), indent=1).encode()


def images_npz() -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez_compressed(file, arr_0=pixels, arr_1=np.array([3, 1, 4, 1, 5]))
    return file.getvalue()


def picture(kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (13, 17, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def crowded_png() -> bytes:
    """With a profile, an orientation, texts and a transparent colour."""
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(99)))
    texts = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\na\n4\n4578"))
    exif = Image.Exif()
    exif[0x0112] = 6
    more = profile + texts + chunk(b"eXIf", exif.tobytes()[6:]) + chunk(b"tRNS", bytes(6))
    return png_of(3, 2, 8, 2, bytes(20), more)


def statistics_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
    return file.getvalue()


def load_statistics(path: Path) -> None:
    for part in ImageFiles.open(path).moments:
        statistics.load(path, part)


def mask_npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.eye(5, dtype=bool))
    return file.getvalue()


def read_all(path: Path) -> None:
    for _ in ImageFiles.open(path).batches(2):
        pass


FILES: dict[str, tuple[Callable[[], bytes], Load]] = {
    "settings.json": (quant_json, QuantConfig.from_file),
    "settings.yaml": (calibration_yaml, CalibrationConfig.from_file),
    "images.npz": (images_npz, read_all),
    "statistics.npz": (statistics_npz, load_statistics),
    "mask.npy": (mask_npy, read_mask),
    "crowded.png": (crowded_png, read_image),
    "image.png": (lambda: picture("PNG", "RGBA"), read_image),
    "image.jpg": (lambda: picture("JPEG", "CMYK"), read_image),
    "image.webp": (lambda: picture("WEBP"), read_image),
}


def attempt(load: Load, path: Path) -> None:
    """Loads, or fails with one line of ours."""
    with in_time():
        try:
            load(path)
        except VarptqError as error:
            assert str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", FILES)
def test_mutated_files(name: str, tmp_path: Path, counted: Callable[[], None]) -> None:
    make, load = FILES[name]
    path = tmp_path / name
    original = make()
    path.write_bytes(original)
    load(path)

    @FUZZ
    @given(mutated(original))
    def fuzz(content: bytes) -> None:
        counted()
        path.write_bytes(content)
        attempt(load, path)

    fuzz()


@pytest.mark.parametrize("name", FILES)
def test_bytes_of_any_kind(name: str, tmp_path: Path, counted: Callable[[], None]) -> None:
    _, load = FILES[name]
    path = tmp_path / name

    @FUZZ
    @given(st.one_of(st.binary(max_size=300), st.text(max_size=80).map(str.encode)))
    def fuzz(content: bytes) -> None:
        counted()
        path.write_bytes(content)
        attempt(load, path)

    fuzz()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", b"[" * 100_000),
        ("settings.json", b'{"a":' * 100_000),
        ("settings.yaml", b"[" * 50_000),
        ("settings.yaml", b"a: &a [*a]"),
        ("settings.yaml", b"a: &a {b: *a}\nsteps: *a"),
        ("settings.yaml", b"!!python/object/apply:os.system ['true']"),
        ("settings.json", b"\xff\xfe{}"),
        ("settings.json", b"NaN"),
    ],
)
def test_settings_made_to_hurt(
    name: str, content: bytes, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VarptqError):
        attempt_raising(FILES[name][1], path)


def attempt_raising(load: Load, path: Path) -> None:
    with in_time():
        load(path)


@pytest.fixture(scope="session")
def saved(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantized = varptq.quantize(tiny, QuantConfig.preset("w8a8+paper"), method="rtn")
    return artifact.save(quantized, tmp_path_factory.mktemp("robust") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", [artifact.format.CONFIG_FILE, artifact.format.WEIGHTS_FILE])
def test_mutated_artifacts(
    name: str, saved: Path, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """An artifact is bound together by hashes, so every change is found, or changed nothing."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    original = (saved / name).read_bytes()
    before = artifact.load(saved).var.state_dict()

    @FUZZ
    @given(mutated(original))
    def fuzz(content: bytes) -> None:
        counted()
        (tmp_path / name).write_bytes(content)
        with in_time():
            try:
                after = artifact.load(tmp_path).var.state_dict()
            except VarptqError as error:
                assert "\n" not in str(error)
                return
        assert all(torch.equal(before[key], after[key]) for key in before)

    fuzz()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mutated_checkpoints(
    suffix: str, tiny: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    var, vae = tmp_path / f"var{suffix}", tmp_path / "vae.safetensors"
    save_file(dict(tiny.vae.state_dict()), vae)
    if suffix == ".pth":
        torch.save(tiny.var.state_dict(), var)
    else:
        save_file({k: v.contiguous() for k, v in tiny.var.state_dict().items()}, var)
    original = var.read_bytes()
    load_model(var=var, vae=vae)

    @FUZZ
    @given(mutated(original))
    def fuzz(content: bytes) -> None:
        counted()
        var.write_bytes(content)
        attempt(lambda path: load_model(var=path, vae=vae), var)

    fuzz()
