"""`varptq edit` as a user meets it: files, tables, JSON, and every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import varptq
from helpers.cli_calls import run, succeed
from helpers.picture_files import png_header

pytestmark = pytest.mark.xdist_group("cli-edit")

BOX = ("--box", "0.25,0.25,0.75,0.75")
FILES = ["0000.png", "0001.png", "edit.json", "grid.png", "mask.png", "tokens.npz"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "w8a8"
    config = varptq.QuantConfig.preset("w8a8+paper")
    varptq.save(varptq.quantize(varptq.load_model("demo"), config, method="rtn"), folder)
    return folder


def test_files_and_document(photo: Path, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--artifact", artifact, "--task", "class", "--label", "cat", "--candidates", 2)
    ran = succeed("edit", photo, *words, *BOX, "--seed", 3, "--cfg", 4, "--out", out, "--json")
    document = ran.document
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert document == json.loads((out / "edit.json").read_text())
    assert (document["task"], document["to"], document["seed"]) == ("class", "cat", 3)
    assert document["sampling"]["cfg"] == 4
    assert document["runtime"] != "float"
    assert document["images"] == [str(out / "0000.png"), str(out / "0001.png")]
    expected = varptq.edit(
        varptq.load(artifact), photo, task="class", to=3, candidates=2,
        box=(0.25, 0.25, 0.75, 0.75), seed=3, cfg=4,
    )  # fmt: skip
    for name, image in zip(document["images"], expected.images, strict=True):
        assert (np.asarray(Image.open(name)) == np.asarray(image)).all()
    with np.load(out / "tokens.npz") as file:
        assert (file["tokens"] == expected.tokens.numpy()).all()
    weight = np.asarray(Image.open(out / "mask.png"))
    assert document["share_changed"] == pytest.approx((weight > 0).mean())
    kept = weight == 0
    original, edited = (np.asarray(Image.open(path)) for path in (photo, out / "0000.png"))
    assert (original[kept] == edited[kept]).all()


def test_a_float_model_a_mask_file_and_the_table(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    mask = Image.new("L", (64, 40))
    mask.paste(255, (20, 10, 40, 30))
    mask.save(tmp_path / "mask.png")
    ran = succeed("edit", photo, "--model", "demo", "--mask", tmp_path / "mask.png",
                  "--fit", "pad", "--out", tmp_path / "out")  # fmt: skip
    assert "demo, float" in ran.out and "64 x 40" in ran.out and "of 130 tokens" in ran.out


def test_raw_pictures_are_the_models(photo: Path, tmp_path: Path) -> None:
    succeed("edit", photo, "--model", "demo", *BOX, "--raw", "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "0000.png").size == (32, 32)


def test_a_folder_of_results_is_replaced_only_when_asked(photo: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", ("edit", photo, "--model", "demo", *BOX, "--out")
    succeed(*words, out)
    first = (out / "0000.png").read_bytes()
    ran = run(*words, out, "--seed", 1)
    assert ran.code == 2 and "exists and is not empty" in ran.err
    assert (out / "0000.png").read_bytes() == first
    succeed(*words, out, "--seed", 1, "--force")
    assert (out / "0000.png").read_bytes() != first
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    assert "holds no edit.json" in run(*words, other, "--force").err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "demo"), "mask: none given; give a mask, a box"),
        (("--model", "demo", "--box", "a,b"), "box 'a,b': expected four numbers"),
        (("--model", "demo", "--box", "0,0,1"), "box 0,0,1: expected x0,y0,x1,y1"),
        (("--model", "demo", *BOX, "--task", "class", "--label", "hrose"), "did you mean horse"),
        (("--model", "demo", *BOX, "--task", "class"), "task class: no class given"),
        (("--model", "demo", *BOX, "--prompt", "a cat"), "reads no texts; leave out --prompt"),
        (("--model", "demo", *BOX, "--label", "cat", "--prompt", "x"), "one of --label, --prompt"),
        (("--model", "demo", *BOX, "--size", "1M"), "this model draws at one size only"),
        (("--model", "demo", *BOX, "--cfg", "strong"), "is no number, nor one per scale"),
        (("--model", "demo", *BOX, "--runtime", "cpu"), "runtime 'cpu': only for artifacts"),
        (("--model", "missing", *BOX), "model 'missing': neither an artifact folder nor"),
        (BOX, "model: give one of a name or folder, --var with --vae, or --random"),
        (("--model", "demo", *BOX, "--mask", "nowhere.png"), "mask and box: both given"),
        (("--model", "demo", "--mask", "nowhere.png"), "mask nowhere.png: no such file"),
        (("--model", "demo", *BOX, "--candidates", "0"), "--candidates"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    photo: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    ran = run("edit", photo, *words, "--out", tmp_path / "out")
    assert ran.code == 2 and message in ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and not ran.out
    assert not list(tmp_path.iterdir())


def masks(folder: Path) -> dict[str, Path]:
    """Masks for the photo and images, each wrong in its own way."""
    made = {
        "other size": Image.new("L", (40, 64), 255),
        "empty": Image.new("L", (64, 40)),
        "full": Image.new("L", (64, 40), 255),
        "dot": Image.new("L", (1, 1), 255),
    }
    paths = {name: folder / f"{name}.png" for name in (*made, "bomb", "cut")}
    for name, image in made.items():
        image.save(paths[name])
    paths["bomb"].write_bytes(png_header(30_000, 30_000))
    paths["cut"].write_bytes(paths["full"].read_bytes()[:60])
    return paths


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (None, "other size", "mask: 40 x 64 pixels, the image has 64 x 40 (upright); make them"),
        (None, "empty", "mask: empty, so nothing would be regenerated; cover a part of the image"),
        (
            None,
            "full",
            "mask: full, so no token of the 8 x 8 grid is kept; leave a part of the image",
        ),
        (None, "cut", "cut.png: cannot be read"),
        ("cut", "full", "cut.png: cannot be read"),
        ("bomb", "full", "bomb.png: its header claims far more than 64 megapixels"),
        ("dot", "dot", "mask: full, so no token"),
    ],
)
def test_pictures_that_cannot_be_used_are_one_line(
    photo: Path, tmp_path: Path, image: str | None, mask: str, message: str
) -> None:
    files = masks(tmp_path)
    source = files[image] if image else photo
    ran = run("edit", source, "--model", "demo", "--mask", files[mask], "--out", tmp_path / "out")
    assert ran.code == 2 and message in ran.err
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_pixel_can_change_its_class(tmp_path: Path) -> None:
    dot = masks(tmp_path)["dot"]
    words = ("--task", "class", "--label", "cat", "--mask", dot, "--out", tmp_path / "out")
    succeed("edit", dot, "--model", "demo", *words)
    assert Image.open(tmp_path / "out" / "0000.png").size == (1, 1)


def test_a_runtime_that_is_missing_is_named(photo: Path, artifact: Path, tmp_path: Path) -> None:
    # One that does not exist, and one that needs a device this call does not ask for.
    for name in ("tpu", "cuda"):
        words = ("--artifact", artifact, "--runtime", name, "--device", "cpu")
        ran = run("edit", photo, *words, *BOX, "--out", tmp_path / "out")
        assert ran.code == 2 and f"error: runtime '{name}': " in ran.err
        assert not list(tmp_path.iterdir())
