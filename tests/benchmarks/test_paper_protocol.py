"""What benchmarks/paper.py checks before the hours, and the models it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import varptq
from benchmarks.common.paper import instruments, job, protocol
from benchmarks.common.paper.models import Published, Random, Shape
from benchmarks.common.paper.rows import picked, rows
from varptq.errors import CheckpointError, InputError
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.preflight import Instruments
from varptq.evaluate.sampling import SampleSet
from varptq.models.presets import ASSETS

SMALL = Shape(blocks=2, width=128, sides=(1, 2, 3), channels=32)


@pytest.fixture(scope="module")
def layout() -> Any:
    asked = job.Job(Path("nowhere"), Random(SMALL), 8, 8)
    return protocol.layout_of(asked, "var-d16")


@given(st.integers(1, 4000))
def test_labels_are_balanced_or_refused(layout: Any, count: int) -> None:
    found = protocol.labels(layout, count, seed=3)
    expected = "ok" if count % 1000 == 0 else "differs" if count < 1000 else "refused"
    assert found.status == expected, found


def test_guidance_is_the_papers(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert protocol.guidance(layout).status == "ok"
    # As an option that is an integer would make of it; and what an image of a demo looks best with.
    for change in ({"cfg": 1}, {"top_k": 0}, {"temperature": 0.9}, {"more_smooth": True}):
        monkeypatch.setattr(protocol, "SETTINGS", job.SETTINGS.replace(**change))
        assert protocol.guidance(layout).status == "refused", change


def test_files_for_the_suite_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {one.status for one in protocol.files(tmp_path, (48, 32))} == {"ok"}
    assert not list(tmp_path.iterdir())

    def sorted_npz(samples: SampleSet, path: Path) -> None:
        (shard,) = samples.shards()
        np.savez(path, arr_0=shard.images, arr_1=shard.labels)

    def darker(samples: SampleSet, folder: Path) -> None:
        folder.mkdir()
        (shard,) = samples.shards()
        for index, image in enumerate(shard.images):
            Image.fromarray(image // 2 * 2).save(folder / f"{index:02}.png")

    monkeypatch.setattr(SampleSet, "export_npz", sorted_npz)
    monkeypatch.setattr(SampleSet, "export_png", darker)
    found = {one.name: one for one in protocol.files(tmp_path, (48, 32))}
    assert {one.status for one in found.values()} == {"refused"}
    assert "sorted by label" in found["npz"].text


@pytest.fixture
def tools(tmp_path: Path) -> Instruments:
    files = instruments.Files(None, None, None, None)
    return files.or_stand_ins(tmp_path, (48, 48), 8, "cpu")


def test_references_that_give_other_numbers(
    tools: Instruments, tmp_path: Path, layout: Any
) -> None:
    assert protocol.reference(tools).status == "ok"
    assert protocol.network(tools).status == "differs"
    assert protocol.tried("metrics", lambda: protocol.possible(layout, tools, 8)).status == "ok"
    assert tools.reference is not None and tools.network is not None
    with np.load(tools.reference.path) as arrays:
        content = dict(arrays)
    folder = tmp_path / "jpeg"
    folder.mkdir()
    for index, image in enumerate(content["arr_0"][:2]):
        Image.fromarray(image).save(folder / f"{index}.jpg")
    found = protocol.reference(replace(tools, reference=ImageFiles.open(folder)))
    assert found.status == "differs" and "2 of them JPEG" in found.text

    def with_file(**changes: Any) -> Instruments:
        path = tmp_path / "other.npz"
        np.savez(path, **{k: v for k, v in {**content, **changes}.items() if v is not None})
        return replace(tools, reference=ImageFiles.open(path))

    spatial = with_file(mu_s=np.zeros(7), sigma_s=np.eye(7))
    tools.network.name = "inception"
    assert "resizes otherwise" in protocol.reference(spatial).text
    assert protocol.reference(spatial).status == "refused"
    tools.network.name = "inception-adm"
    assert protocol.network(tools).status == protocol.reference(spatial).status == "ok"
    bad = with_file(sigma=-content["sigma"])
    finding = protocol.tried("metrics", lambda: protocol.possible(layout, bad, 8))
    assert finding.status == "refused" and "no covariance" in finding.text
    assert protocol.originals(tools, 16, layout).status == "ok"
    assert "16 real images, expected 17" in protocol.originals(tools, 17, layout).text


def test_every_check_is_said_before_one_ends_the_run(tmp_path: Path) -> None:
    asked = job.Job(tmp_path, Published(tmp_path), 1500, 8)
    said: list[str] = []
    with pytest.raises(InputError, match=r"^weights: .*no var_d16.pth.*\(and 4 more refused\)$"):
        protocol.checked(asked, picked(["main/var-d16/*"], rows()), Instruments(), said.append)
    assert sum(line.startswith("refused") for line in said) == 5
    assert all("\n" not in line for line in said)


def test_images_that_lie_there_at_once(tmp_path: Path) -> None:
    asked = job.Job(tmp_path, Random(SMALL), 8, 8)
    chosen = picked(["main/*/float", "main/*/w4a4/sas", "class/*/sas"], rows())
    images = {row: 0.0 if row.table == "class" else 10.0 for row in chosen}
    # Four float models and one more row; with all rows kept, four more.
    assert protocol.at_once(asked, chosen, images) == 50
    assert protocol.at_once(replace(asked, keep=True), chosen, images) == 80
    assert protocol.at_once(asked, chosen[:1], images) == 10


# Weights


def test_published_weights_lie_in_a_folder(tmp_path: Path) -> None:
    source = Published(ASSETS)
    found, usual = source.load("demo"), varptq.load_model("demo")
    assert (found.name, found.class_names, found.sources) == (
        "demo",
        usual.class_names,
        usual.sources,
    )
    text = source.load("demo-text")
    assert text.scales == varptq.load_model("demo-text").scales and text.encoder is not None
    with pytest.raises(CheckpointError, match=r"no var_d16.pth, one of the two files of var-d16"):
        Published(tmp_path).check("var-d16")
    for name, own in (("var_d16.pth", "var"), ("vae_ch160v4096z32.pth", "vae")):
        (tmp_path / name).symlink_to(ASSETS / "demo" / f"{own}_demo.safetensors")
    Published(tmp_path).check("var-d16")
    with pytest.raises(CheckpointError, match=r"var_d16.pth: depth 6, expected 16 of var-d16"):
        Published(tmp_path).load("var-d16")


@pytest.mark.parametrize("name", ["var-d16", "infinity-2b"])
def test_random_models_have_the_shape_that_was_asked_for(name: str) -> None:
    # Odd sizes: three heads of 64, eight of 40 or so.
    shape = Shape(blocks=3, width=192, sides=(1, 2, 5), channels=32)
    pipe = Random(shape).load(name)
    arch = pipe.var.arch
    assert (arch.depth, arch.width) == (3, 192) and arch.width % arch.num_heads == 0
    assert pipe.scales.num_scales == 3
    images = varptq.generate(pipe, pipe.pool()[:1]).images
    assert images is not None and bool(images.isfinite().all())
    with pytest.raises(InputError, match="width 6: expected a multiple of 4"):
        Shape(width=6).build("var-d16")
