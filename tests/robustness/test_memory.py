"""Files that promise more than they hold, read under a limit of memory in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.picture_files import chunk, png_header, png_of

# What the process may take above what it has when its imports are done.
MEBIBYTES = 600
PROGRAM = """
import re, resource, sys
from pathlib import Path
import varptq
from varptq import artifact
from varptq.reading import read_image
from varptq.evaluate import statistics
from varptq.evaluate.image_files import ImageFiles
from varptq.models.pipeline import load_model
from varptq.quant.config import QuantConfig
from varptq.errors import VarptqError
loaders = {"image": read_image, "npz": lambda p: list(ImageFiles.open(p).batches(4)),
           "checkpoint": lambda p: load_model(var=p, vae=p), "settings": QuantConfig.from_file,
           "statistics": lambda p: statistics.load(p, "pooled"), "artifact": artifact.load}
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
limit = size + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for kind, path in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        loaders[kind](Path(path))
    except VarptqError as error:
        print(error)
    else:
        print(path, "was read")
"""


def promising_npz(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 256, 256, 3)}
        with archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(1000))


def zip_bomb(path: Path) -> None:
    """A gigabyte of zeros in a megabyte of archive."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("model/data.pkl", "w", force_zip64=True) as member,
    ):
        for _ in range(16):
            member.write(bytes(2**26))


def wide_png(path: Path) -> None:
    path.write_bytes(png_header(2**31 - 1, 1))


def large_png(path: Path) -> None:
    path.write_bytes(png_header(30_000, 30_000))


def packed_texts(path: Path) -> None:
    """A picture of one pixel with texts that unpack to 3 GB, and one that promises 2 GB."""
    bomb = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**24)))
    promise = struct.pack(">I", 2**31 - 1) + b"tEXt"
    path.write_bytes(png_of(1, 1, 8, 2, bytes(4), 160 * bomb + promise))


def promising_statistics(path: Path) -> None:
    """mu and sigma of 100,000 features, of which the file holds nothing."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("mu", (10**5,)), ("sigma", (10**5, 10**5))):
            with archive.open(f"{name}.npy", "w") as member:
                header = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)


def promising_safetensors(path: Path) -> None:
    size = 2**40
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"pos_start": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def blank(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200_000_000)


HOSTILE: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "a picture of 30,000 x 30,000": ("image", "x.png", large_png),
    "a picture of 2^31 columns": ("image", "x.png", wide_png),
    "texts that unpack to gigabytes": ("image", "x.png", packed_texts),
    "statistics of 100,000 features": ("statistics", "x.npz", promising_statistics),
    "ten million images": ("npz", "x.npz", promising_npz),
    "a deflated checkpoint": ("checkpoint", "x.pth", zip_bomb),
    "a tensor of a terabyte": ("checkpoint", "x.safetensors", promising_safetensors),
    "a header of exabytes": ("checkpoint", "x.safetensors", long_header),
    "settings of 200 MB": ("settings", "x.json", blank),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own size from /proc")
def test_promises_are_not_believed(tmp_path: Path, warm: Path, counted: Callable[[], None]) -> None:
    words, paths = [], []
    for number, (kind, name, make) in enumerate(HOSTILE.values()):
        counted()
        paths.append(tmp_path / f"{number}{name}")
        make(paths[-1])
        words += [kind, str(paths[-1])]
    command = [str(warm / "python"), "-c", PROGRAM, str(MEBIBYTES), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(HOSTILE)
    for line, path, what in zip(lines, paths, HOSTILE, strict=True):
        assert path.name in line and "was read" not in line, what
