"""Folders and npz files of real images as people have them: read whole, or what is left out is
told, or refused before anything is sampled."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.picture_files import file_of
from varptq.editing.reading import read_mask
from varptq.errors import InputError
from varptq.evaluate.image_files import ImageFiles

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(image) for image in PIXELS]
FORK = b"\0\5\x16\7\0\2\0\0Mac OS X        "


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files, empty before."""
    shutil.rmtree(path, ignore_errors=True)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def png(number: int = 0) -> bytes:
    return file_of(PICTURES[number])


def images_of(files: ImageFiles) -> np.ndarray:
    return np.concatenate(list(files.batches(4)))


def test_pictures_of_any_suffix_are_read(tmp_path: Path, counted: Callable[[], None]) -> None:
    kinds = {".png": "PNG", ".PNG": "PNG", ".jpg": "JPEG", ".JPG": "JPEG", ".jpeg": "JPEG"}
    kinds |= {".JPEG": "JPEG", ".jfif": "JPEG", ".webp": "WEBP", ".WebP": "WEBP"}
    contents = [
        file_of(picture, kind, **({"quality": 100} if kind != "PNG" else {}))
        for picture, kind in zip(PICTURES, kinds.values(), strict=True)
    ]
    names = [f"{number}{suffix}" for number, suffix in enumerate(kinds)]
    # The content decides: PNGs called .JPEG stand in ImageNet.
    contents[5] = png(5)
    files = ImageFiles.open(folder_of(tmp_path / "real", dict(zip(names, contents, strict=True))))
    assert (files.count, files.size, files.warning) == (9, (6, 6), None)
    for name, content, found in zip(names, contents, images_of(files), strict=True):
        counted()
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(found, expected), name


def test_folders_below_and_behind_links_are_read(
    tmp_path: Path, counted: Callable[[], None]
) -> None:
    elsewhere = folder_of(tmp_path / "elsewhere", {"3.png": png(3)})
    names = {"ants/0.png": png(0), "bees/small/1.png": png(1), "x.png/2.png": png(2)}
    real = folder_of(tmp_path / "real", names)
    (real / "cats").symlink_to(elsewhere)
    (real / "cats" / "round").symlink_to(real)
    (real / "y.png").symlink_to(elsewhere / "3.png")
    os.mkfifo(real / "z.png")
    files = ImageFiles.open(real)
    counted()
    assert [str(path.relative_to(real)) for path in files.files] == [
        *("ants/0.png", "bees/small/1.png", "cats/3.png", "x.png/2.png", "y.png")
    ]


LEFT_OUT = {
    "other formats": (
        {"1.bmp": b"BM", "2.TIF": b"II*\0", "3.tiff": b"II*\0", "4.heic": b"x", "5.gif": b"GIF8"},
        "left out 1 .TIF, 1 .bmp, 1 .gif, 1 .heic, 1 .tiff",
    ),
    "no suffix": ({"1": png(1), "2": png(2)}, "left out 2 without a suffix"),
    "numbered": (
        {f"x.{number:04}": b"" for number in range(20)},
        "left out 1 .0000, 1 .0001, 1 .0002, 1 .0003, 1 .0004, 1 .0005, 14 others",
    ),
    "texts": ({"labels.txt": b"1", "LICENSE": b"MIT"}, "left out 1 .txt, 1 without a suffix"),
    "resource forks": ({"__MACOSX/._0.png": FORK, "._0.png": FORK}, "left out 2 hidden (._0.png)"),
    "notebooks": (
        {".ipynb_checkpoints/0-checkpoint.png": png(0)},
        "left out 1 hidden (.ipynb_checkpoints/0-checkpoint.png)",
    ),
    "previews of a server": ({"@eaDir/0.png/THUMB.jpg": png(0)}, "left out 1 hidden (@eaDir/"),
    "what systems leave": ({".DS_Store": b"x", "Thumbs.db": b"x", "desktop.ini": b"x"}, None),
    "one stem twice": (
        {"0.jpg": png(0)},
        "1 twice under two suffixes (0.jpg and 0.png), each counted",
    ),
}


def test_what_is_left_out_is_told(tmp_path: Path, counted: Callable[[], None]) -> None:
    for what, (more, expected) in LEFT_OUT.items():
        counted()
        files = ImageFiles.open(folder_of(tmp_path / "real", {"0.png": png()} | more))
        assert files.count == (2 if "twice" in what else 1), what
        assert (files.warning is None) == (expected is None), what
        assert expected is None or expected in (files.warning or ""), what


REFUSED = {
    "a fork of its own": ({"1.png": FORK}, r"1\.png: not a JPEG.* but a resource fork of macOS"),
    "an empty file": ({"1.png": b""}, r"1\.png: not a JPEG.* but empty"),
    "a pointer of git-lfs": ({"1.png": b"version https://git-lfs"}, r"1\.png: not a .* git-lfs"),
    "a page": ({"1.jpg": b"<html>"}, r"1\.jpg: not a .* but HTML"),
    "half a file": ({"1.png": file_of(PICTURES[1].resize((64, 64)))[:900]}, r"1\.png: cannot be"),
    "another size": (
        {"b/1.png": file_of(PICTURES[1].resize((5, 7)))},
        r"of sizes 6 x 6 \(0\.png\) and 7 x 5 \(b/1\.png\), expected one",
    ),
}


def test_what_cannot_be_read_is_found_at_once(tmp_path: Path, counted: Callable[[], None]) -> None:
    for more, expected in REFUSED.values():
        counted()
        with pytest.raises(InputError, match=expected) as error:
            ImageFiles.open(folder_of(tmp_path / "real", {"0.png": png()} | more))
        assert "\n" not in str(error.value)
    counted()
    real = folder_of(tmp_path / "real", {"0.png": png()})
    for target, expected in (
        ("gone.png", "a link to a file that does not exist"),
        ("1.png", "cannot"),
    ):
        (real / "1.png").unlink(missing_ok=True)
        (real / "1.png").symlink_to(real / target)
        with pytest.raises(InputError, match=rf"1\.png: {expected}"):
            ImageFiles.open(real)
    for files, expected in (
        ({"1.bmp": b"BM"}, r"no JPEG, PNG or WebP in this folder \(left out 1 \.bmp\)"),
        ({"._1.png": FORK}, r"no JPEG, PNG or WebP in this folder \(left out 1 hidden"),
    ):
        counted()
        with pytest.raises(InputError, match=expected):
            ImageFiles.open(folder_of(tmp_path / "real", files))


def test_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, counted: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted()
    real = folder_of(tmp_path / "real", {"0.png": png(), "b/1.png": png(1)})
    scandir = os.scandir

    def refusing(path: Path) -> Any:
        if path.name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"real/b: cannot be listed \(Permission denied\)"):
        ImageFiles.open(real)


def saved(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


OBJECTS = np.array([{"a": 1}] * 9, dtype=object)
SPLIT = {"arr_0": PIXELS[:5], "arr_1": PIXELS[5:]}
NPZ_TOLD = {
    "arrays of images": (SPLIT, "left out arr_1, only arr_0 is read"),
    "two names": ({"arr_0": PIXELS, "images": PIXELS}, "left out images, only arr_0 is read"),
    "labels as objects": ({"arr_0": PIXELS, "arr_1": OBJECTS}, "left out arr_1, only arr_0"),
    "labels of others": ({"arr_0": PIXELS, "arr_1": np.arange(4)}, "left out arr_1, only arr_0"),
    "labels in a column": ({"arr_0": PIXELS, "arr_1": np.arange(9)[:, None]}, "sorted by label"),
    "labels in Fortran order": (
        {"arr_0": PIXELS, "arr_1": np.asfortranarray(np.arange(9)[::-1].reshape(9, 1))},
        None,
    ),
}
NPZ_REFUSED = {
    "Fortran order": (
        {"arr_0": np.asfortranarray(PIXELS)},
        r"arr_0 is uint8 \(9, 6, 6, 3\) in Fortran order; save it with numpy.ascontiguousarray",
    ),
    "channels first": ({"arr_0": PIXELS.transpose(0, 3, 1, 2).copy()}, r"is uint8 \(9, 3, 6, 6\)"),
    "other names": ({"x": PIXELS, "y": PIXELS}, r"\(holds x, y\); expected .* arr_0"),
    "labels first": ({"arr_0": np.arange(9), "arr_1": PIXELS}, r"arr_0 is int64 \(9,\)"),
    "objects": ({"arr_0": OBJECTS}, r"arr_0 is object \(9,\)"),
    "no image": ({"arr_0": PIXELS[:0]}, r"arr_0 is uint8 \(0, 6, 6, 3\), no image"),
}


def test_a_broken_header_of_an_array_is_one_line(
    tmp_path: Path, counted: Callable[[], None]
) -> None:
    for header in ("{'shape': (9, 6", "{'shape': [", "9", "", "{}", "\0", "{'descr': '|u1'"):
        counted()
        text = header.ljust(117).encode() + b"\n"
        content = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text
        with zipfile.ZipFile(tmp_path / "real.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
        (tmp_path / "mask.npy").write_bytes(content)
        for read, path in ((ImageFiles.open, "real.npz"), (read_mask, "mask.npy")):
            with pytest.raises(InputError, match=f"{path}: cannot be read") as error:
                read(tmp_path / path)
            assert "\n" not in str(error.value), header


def test_arrays_that_are_not_read_are_told(tmp_path: Path, counted: Callable[[], None]) -> None:
    for what, (arrays, expected) in NPZ_TOLD.items():
        counted()
        files = ImageFiles.open(saved(tmp_path / "real.npz", arrays))
        assert np.array_equal(images_of(files), arrays["arr_0"]), what
        assert (files.warning is None) == (expected is None), what
        assert expected is None or expected in (files.warning or ""), what


def test_arrays_of_another_kind_are_refused(tmp_path: Path, counted: Callable[[], None]) -> None:
    for arrays, expected in NPZ_REFUSED.values():
        counted()
        with pytest.raises(InputError, match=expected) as error:
            ImageFiles.open(saved(tmp_path / "real.npz", arrays))
        assert "\n" not in str(error.value)
