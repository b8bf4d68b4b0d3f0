"""Images in the files of other tools: read in pieces, refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varptq.errors import InputError
from varptq.evaluate.image_files import ImageFiles, write_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 3, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 2, 0, 0])


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@settings(max_examples=30)
@given(order=st.permutations(range(7)), cuts=st.sets(st.integers(1, 6)), size=st.integers(1, 8))
def test_pieces_in_any_order_come_back_in_place(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cuts: set[int], size: int
) -> None:
    path = tmp_path_factory.mktemp("npz") / "set.npz"
    pieces = [np.array(part) for part in np.split(order, sorted(cuts))]
    write_npz(path, 7, ((part, IMAGES[part], LABELS[part]) for part in pieces))
    with np.load(path) as arrays:
        assert (arrays["arr_0"] == IMAGES).all() and (arrays["arr_1"] == LABELS).all()
    batches = list(ImageFiles.open(path).batches(size))
    assert (np.concatenate(batches) == IMAGES).all()
    assert {len(batch) for batch in batches[:-1]} <= {size}


def test_compressed_files_are_read_too(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", arr_0=IMAGES)
    files = ImageFiles.open(tmp_path / "a.npz")
    assert (files.count, files.warning) == (7, None)
    assert (np.concatenate(list(files.batches(4))) == IMAGES).all()


def test_images_may_be_called_images(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", labels=np.sort(LABELS), images=IMAGES)
    files = ImageFiles.open(path)
    assert files.warning and (np.concatenate(list(files.batches(4))) == IMAGES).all()


@pytest.mark.parametrize("name", ["arr_1", "labels"])
def test_sorted_labels_are_warned_of(tmp_path: Path, name: str) -> None:
    for labels, warned in ((np.sort(LABELS), True), (LABELS, False), (np.zeros(7), False)):
        files = ImageFiles.open(saved(tmp_path / "a.npz", arr_0=IMAGES, **{name: labels}))
        assert (files.warning is not None) == warned
    assert "sorted by label" in (
        ImageFiles.open(saved(tmp_path / "b.npz", arr_0=IMAGES, arr_1=np.sort(LABELS))).warning
        or ""
    )


def test_folders_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / ("deep" if index > 4 else "") / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = ImageFiles.open(tmp_path)
    assert files.count == 7
    assert (np.concatenate(list(files.batches(3))) == IMAGES).all()
    Image.fromarray(IMAGES[0].transpose(1, 0, 2)).save(tmp_path / "deep" / "7.png")
    with pytest.raises(InputError, match="of sizes"):
        list(ImageFiles.open(tmp_path).batches(8))
    (tmp_path / "9.png").write_bytes(b"no png")
    with pytest.raises(InputError, match=r"9\.png: not a JPEG, PNG or WebP"):
        list(ImageFiles.open(tmp_path).batches(1))


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no zip")
    broken = saved(tmp_path / "broken.npz", arr_0=IMAGES)
    content = bytearray(broken.read_bytes())
    content[200] ^= 1
    broken.write_bytes(content)
    bad = [
        tmp_path / "nowhere.npz",
        tmp_path / "empty",
        tmp_path / "text.npz",
        broken,
        saved(tmp_path / "other.npz", pixels=IMAGES),
        saved(tmp_path / "float.npz", arr_0=IMAGES.astype(np.float32)),
        saved(tmp_path / "grey.npz", arr_0=IMAGES[..., 0]),
        saved(tmp_path / "none.npz", arr_0=IMAGES[:0]),
        saved(tmp_path / "fortran.npz", arr_0=np.asfortranarray(IMAGES)),
    ]
    for path in bad:
        with pytest.raises(InputError, match=path.name) as error:
            list(ImageFiles.open(path).batches(2))
        assert "\n" not in str(error.value)
