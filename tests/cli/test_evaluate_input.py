"""What users hand to `varptq evaluate` that cannot be used: each is found before anything is
sampled where it can be, is one line, and leaves nothing half-written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.cli_calls import run, succeed
from varptq.errors import InputError, NonFiniteError
from varptq.evaluate.evaluate import Subject, evaluate
from varptq.evaluate.features import ModuleFeatures
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.preflight import Instruments, plan
from varptq.evaluate.sampling import sample_set
from varptq.models.pipeline import Pipeline

RANDOM = np.random.default_rng(0)


class Means(nn.Module):
    """Three features of any image; NaN for one that is nearly white, as a broken network gives."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        means = images_B3HW.mean((2, 3))
        return torch.where(means > 0.99, torch.full_like(means, torch.nan), means)


class Flat(nn.Module):
    """Takes images of 4 x 4 only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 3)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.layer(images_B3HW.flatten(1))


class Probabilities(nn.Module):
    """Colours as features, with probabilities of three classes."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = images_B3HW.mean((2, 3))
        return means, means, (5 * means).softmax(-1)


def pixels(count: int, side: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def reference(folder: Path, images: np.ndarray) -> ImageFiles:
    np.savez(folder / "real.npz", arr_0=images)
    return ImageFiles.open(folder / "real.npz")


@pytest.fixture
def means_file(tmp_path: Path) -> Path:
    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


@pytest.mark.parametrize(("count", "real"), [(1, 9), (3, 9), (9, 3), (9, 1), (4, 4)])
def test_sets_too_small_for_a_metric(tiny: Pipeline, tmp_path: Path, count: int, real: int) -> None:
    """Left out with the reason when everything is measured, refused when asked for by name."""
    tools = Instruments(ModuleFeatures(Means(), "means"), reference(tmp_path, pixels(real, 6)))
    fewest = min(count, real)
    if fewest == 1:
        with pytest.raises(InputError, match=r"metric 'fid': needs at least 2 images in each"):
            plan(tiny, None, tools, ["fid"], count)
    if fewest < 4:
        with pytest.raises(InputError, match=r"metric 'recall': needs at least 4 images in each"):
            plan(tiny, None, tools, ["recall"], count)
    if fewest > 1:
        chosen, left_out = plan(tiny, None, tools, None, count)
        assert "fid" in chosen and ("precision" in chosen) == (fewest >= 4)
        assert ("precision" in left_out) == (fewest < 4)


@pytest.mark.parametrize("form", ["npz", "png"])
def test_real_images_of_another_size_are_refused(tiny: Pipeline, tmp_path: Path, form: str) -> None:
    from PIL import Image

    files = reference(tmp_path, pixels(5, 7))
    if form == "png":
        for index, image in enumerate(pixels(5, 7)):
            Image.fromarray(image[:, :5]).save(tmp_path / f"{index}.png")
        files = ImageFiles.open(tmp_path)
    assert files.size == (7, 5 if form == "png" else 7)
    tools = Instruments(ModuleFeatures(Means(), "means"), files)
    with pytest.raises(InputError, match="expected 6 x 6 like the samples of 'tiny'; resize"):
        plan(tiny, None, tools, None, 9)
    # Without a metric on real images their size says nothing.
    plan(tiny, tiny, tools, ["fid2fp"], 9)


@pytest.mark.parametrize("scripted", [False, True])
def test_a_network_for_images_of_another_size_says_so(tiny: Pipeline, scripted: bool) -> None:
    module = torch.jit.script(Flat()) if scripted else Flat()
    tools = Instruments(ModuleFeatures(module, "flat"))
    with pytest.raises(InputError, match="network 'flat': fails for images of 6 x 6") as error:
        plan(tiny, tiny, tools, None, 9)
    assert "\n" not in str(error.value) and "shapes cannot be multiplied" in str(error.value)


def test_nan_features_are_refused(tiny: Pipeline, tmp_path: Path) -> None:
    white = pixels(6, 6)
    white[4] = 255
    tools = Instruments(ModuleFeatures(Means(), "means"), reference(tmp_path, white))
    subject = Subject(tiny, sample_set(tiny, tmp_path / "samples", count=6))
    with pytest.raises(NonFiniteError, match="features: hold NaN or infinity"):
        evaluate(subject, instruments=tools, metrics=["fid"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (pixels(5, 32).astype(np.float32) / 255, "arr_0 is float32 (5, 32, 32, 3)"),
        (pixels(5, 16), "16 x 16, expected 32 x 32"),
        (np.full((5, 32, 32, 3), 255, np.uint8), "features: hold NaN or infinity"),
        (pixels(1, 32), "metric 'fid': needs at least 2 images in each set"),
    ],
    ids=["floats", "size", "nan", "few"],
)
def test_the_command_says_it_in_one_line_and_writes_no_numbers(
    content: np.ndarray, expected: str, means_file: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "real.npz", arr_0=content)
    tools = ("--network", f"module:{means_file}", "--reference", tmp_path / "real.npz")
    words = ("evaluate", "demo", *tools, "--metrics", "fid", "--count", 2)
    ran = run(*words, "--out", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith("error: ") and expected in ran.err
    # Only what can be found out by looking at every image is found out after sampling.
    sampled = (tmp_path / "out").exists()
    assert sampled == ("NaN" in expected)
    assert not (tmp_path / "out" / "metrics.json").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from varptq.cli.main import app
app(prog_name="varptq")
"""


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, warm: Path) -> None:
    """A real process whose files may not grow beyond what one shard needs."""
    words = ["evaluate", "demo", "--metrics", "is", "--count", "9", "--seed", "4", "--out"]
    script = tmp_path / "probabilities.pt"
    torch.jit.script(Probabilities()).save(str(script))
    words += [str(tmp_path / "out"), "--network", f"module:{script}"]
    limited = subprocess.run(
        [str(warm / "python"), "-c", LIMITED, "20000", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert limited.returncode == 2, limited.stderr
    assert limited.stderr.splitlines()[-1].startswith("error: ")
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left == ["samples.json"]
    after = succeed(*words, "--json").document
    words[words.index("--out") + 1] = str(tmp_path / "direct")
    direct = succeed(*words, "--json").document
    assert after["checksums"] == direct["checksums"] and after["metrics"] == direct["metrics"]
