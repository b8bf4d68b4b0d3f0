"""Files that promise more than they hold, read under a limit of memory, in a process of its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# What the process may take above what it has when its imports are done.
MEBIBYTES = 600
PROGRAM = """
import re, resource, sys
from pathlib import Path
import varptq
from varptq import artifact
from varptq.reading import read_image
from varptq.evaluate.image_files import ImageFiles
from varptq.models.pipeline import load_model
from varptq.quant.config import QuantConfig
from varptq.errors import VarptqError
loaders = {"image": read_image, "npz": lambda p: list(ImageFiles.open(p).batches(4)),
           "checkpoint": lambda p: load_model(var=p, vae=p), "settings": QuantConfig.from_file,
           "artifact": artifact.load}
size = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
limit = size + int(sys.argv[3]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    loaders[sys.argv[1]](Path(sys.argv[2]))
except VarptqError as error:
    print(error)
    sys.exit(2)
"""


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels, with next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


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
    "ten million images": ("npz", "x.npz", promising_npz),
    "a deflated checkpoint": ("checkpoint", "x.pth", zip_bomb),
    "a tensor of a terabyte": ("checkpoint", "x.safetensors", promising_safetensors),
    "a header of exabytes": ("checkpoint", "x.safetensors", long_header),
    "settings of 200 MB": ("settings", "x.json", blank),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own size from /proc")
@pytest.mark.parametrize("what", HOSTILE)
def test_promises_are_not_believed(what: str, tmp_path: Path, counted: Callable[[], None]) -> None:
    counted()
    kind, name, make = HOSTILE[what]
    path = tmp_path / name
    make(path)
    command = [sys.executable, "-c", PROGRAM, kind, str(path), str(MEBIBYTES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-1500:]
    assert done.stdout.count("\n") == 1
