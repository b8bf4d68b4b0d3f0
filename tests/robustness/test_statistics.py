"""Statistics that others published in place of real images: used where they fit, refused before
sampling where they are none, and named in what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varptq.errors import InputError
from varptq.evaluate.evaluate import Subject, evaluate
from varptq.evaluate.features import ModuleFeatures
from varptq.evaluate.frechet import Gaussian, frechet_distance
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.prdc import precision_recall
from varptq.evaluate.preflight import Instruments, plan
from varptq.evaluate.report import render
from varptq.evaluate.sampling import sample_set
from varptq.models.pipeline import Pipeline

COUNT = 9
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (11, 6, 6, 3), dtype=np.uint8)


class Means(nn.Module):
    """Three pooled features, two spatial ones, and probabilities of three classes."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = images_B3HW.mean((2, 3))
        return means, images_B3HW[:, :2, 0, 0], (5 * means).softmax(-1)


class Counting(ModuleFeatures):
    """Counts the images it has seen."""

    def __init__(self, name: str = "means") -> None:
        super().__init__(Means(), name)
        self.seen = 0

    def __call__(self, pixels_BHW3: Tensor) -> Any:
        self.seen += len(pixels_BHW3)
        return super().__call__(pixels_BHW3)


def covariance(dim: int) -> np.ndarray:
    rows = RANDOM.normal(size=(20, dim))
    return np.cov(rows, rowvar=False)


MU, SIGMA = RANDOM.random(3), covariance(3)
MU_S, SIGMA_S = RANDOM.random(2), covariance(2)
POOLED = {"mu": MU, "sigma": SIGMA}
SUITE = {"arr_0": PIXELS, **POOLED, "mu_s": MU_S, "sigma_s": SIGMA_S}


@pytest.fixture(scope="module")
def subject(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tiny, sample_set(tiny, tmp_path_factory.mktemp("samples") / "s", count=COUNT))


def opened(folder: Path, arrays: dict[str, Any], name: str = "real.npz") -> ImageFiles:
    np.savez(folder / name, **arrays)
    return ImageFiles.open(folder / name)


def measured(subject: Subject, files: ImageFiles, *metrics: str, name: str = "means") -> Any:
    tools = Instruments(ModuleFeatures(Means(), name), files)
    return evaluate(subject, instruments=tools, metrics=metrics or None)


def expected(subject: Subject, part: str, mean: np.ndarray, matrix: np.ndarray) -> float:
    images = np.concatenate([shard.images for shard in subject.samples.shards()])
    features = getattr(ModuleFeatures(Means(), "means")(torch.from_numpy(images)), part)
    theirs = Gaussian.from_moments(torch.from_numpy(mean), torch.from_numpy(matrix))
    return frechet_distance(Gaussian.of(features), theirs)


def test_a_file_of_the_suite(subject: Subject, tmp_path: Path, counted: Callable[[], None]) -> None:
    """Distances by its statistics, precision and recall by its images, and the document says so."""
    counted()
    document = measured(subject, opened(tmp_path, SUITE))
    found, from_ = document["metrics"], document["taken_from"]
    assert found["fid"] == pytest.approx(expected(subject, "pooled", MU, SIGMA), rel=1e-6)
    assert found["sfid"] == pytest.approx(expected(subject, "spatial", MU_S, SIGMA_S), rel=1e-6)
    images = np.concatenate([shard.images for shard in subject.samples.shards()])
    ours, real = (
        ModuleFeatures(Means(), "means")(torch.from_numpy(x)).pooled for x in (images, PIXELS)
    )
    assert (found["precision"], found["recall"]) == precision_recall(real, ours)
    against = "9 samples against"
    assert from_ == {
        "is": "9 samples",
        "fid": f"{against} mu and sigma of real.npz",
        "sfid": f"{against} mu_s and sigma_s of real.npz",
        "precision": f"{against} 11 images of real.npz",
        "recall": f"{against} 11 images of real.npz",
    }
    assert document["settings"]["reference_images"] == 11 and document["warnings"] == []
    document["model"] = None
    page = render(document)
    assert "Precision, Recall: 9 samples against 11 images of real.npz" in page
    assert "Inception Score: 9 samples;" in page and "FID: 9 samples against mu and sigma" in page


def test_its_images_are_not_looked_at_for_a_distance(
    subject: Subject, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    network = Counting()
    tools = Instruments(network, opened(tmp_path, SUITE))
    document = evaluate(subject, instruments=tools, metrics=["fid", "sfid"])
    assert network.seen == COUNT + 1  # one to see what the network gives
    assert set(document["taken_from"]) == {"fid", "sfid"}


def test_statistics_alone(subject: Subject, tmp_path: Path, counted: Callable[[], None]) -> None:
    """As pytorch-fid, MAR and DiT write them."""
    counted()
    files = opened(tmp_path, POOLED)
    assert (files.count, files.size, files.warning) == (0, None, None)
    document = measured(subject, files)
    assert document["metrics"].keys() == {"fid", "is", "is_std"} - {"is_std"}
    assert document["left_out"]["sfid"].startswith("real images or their spatial statistics")
    assert "statistics of images are not enough" in document["left_out"]["precision"]
    assert document["settings"]["reference_images"] is None
    for name, needed in (
        ("precision", "real images"),
        ("recall", "real images"),
        ("sfid", "real images or their spatial statistics"),
    ):
        counted()
        tools = Instruments(ModuleFeatures(Means(), "means"), files)
        with pytest.raises(InputError, match=f"metric '{name}': needs {needed}") as error:
            plan(subject.pipe, None, tools, ["fid", name], COUNT)
        assert "\n" not in str(error.value)


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda x: x.astype(np.float32),
    "float16": lambda x: x.astype(np.float16),
    "the other byte order": lambda x: x.astype(">f8"),
    "Fortran order": np.asfortranarray,
    "a view": lambda x: np.repeat(x, 2, -1)[..., ::2],
}


def test_statistics_of_any_precision_and_order(
    subject: Subject, tmp_path: Path, counted: Callable[[], None]
) -> None:
    whole = expected(subject, "pooled", MU, SIGMA)
    for what, form in FORMS.items():
        counted()
        files = opened(tmp_path, {"mu": form(MU), "sigma": form(SIGMA)})
        found = measured(subject, files, "fid")["metrics"]["fid"]
        rough = 1e-2 if what == "float16" else 1e-5
        assert found == pytest.approx(whole, rel=rough), what
    counted()
    np.savez_compressed(tmp_path / "packed.npz", **POOLED)
    packed = measured(subject, ImageFiles.open(tmp_path / "packed.npz"), "fid")
    assert packed["metrics"]["fid"] == pytest.approx(whole, rel=1e-9)


def changed(**entries: float) -> np.ndarray:
    """SIGMA with entries, named by row and column, replaced."""
    matrix = SIGMA.copy()
    for place, value in entries.items():
        matrix[int(place[1]), int(place[2])] = value
    return matrix


NO_STATISTICS = {
    "NaN in the mean": ({"mu": MU * np.nan, "sigma": SIGMA}, "mu holds NaN or infinity"),
    "infinity": ({"mu": MU, "sigma": changed(_00=np.inf)}, "sigma holds NaN or infinity"),
    "not symmetric": ({"mu": MU, "sigma": changed(_01=9)}, "sigma differs from its transpose by"),
    "negative variance": ({"mu": MU, "sigma": changed(_00=-1)}, "sigma has the variance -1"),
    "no covariance": (
        {"mu": MU, "sigma": changed(_01=9, _10=9)},
        "sigma has a negative eigenvalue",
    ),
    "another network": (
        {"mu": RANDOM.random(5), "sigma": covariance(5)},
        r"mu is of 5 features, network 'means' gives 3; take statistics of this network",
    ),
    "mean alone": ({"mu": MU}, r"\(has mu of mu and sigma alone\)"),
    "covariance alone": ({"sigma": SIGMA}, r"\(has sigma of mu and sigma alone\)"),
    "spatial mean alone": ({**POOLED, "mu_s": MU_S}, r"\(has mu_s of mu_s and sigma_s alone\)"),
    "standard deviations": ({"mu": MU, "sigma": MU}, r"sigma is float64 \(3,\)"),
    "a row": ({"mu": MU[None], "sigma": SIGMA}, r"mu is float64 \(1, 3\)"),
    "of two networks": ({"mu": MU, "sigma": SIGMA_S}, r"sigma is float64 \(2, 2\)"),
    "integers": ({"mu": MU.astype(int), "sigma": SIGMA}, r"mu is int64 \(3,\)"),
    "objects": ({"mu": MU.astype(object), "sigma": SIGMA}, r"mu is object \(3,\)"),
    "nothing": ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, r"mu is float64 \(0,\)"),
    "other names": ({"mean": MU, "cov": SIGMA}, r"\(holds mean, cov\); expected .* mu \(D,\)"),
}


def test_what_is_no_statistics_is_refused_before_sampling(
    tiny: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    for arrays, said in NO_STATISTICS.values():
        for metrics in (None, ["fid"]):
            counted()
            with pytest.raises(InputError, match=said) as error:
                files = opened(tmp_path, arrays)
                tools = Instruments(ModuleFeatures(Means(), "means"), files)
                plan(tiny, tiny, tools, metrics, COUNT)
            assert "\n" not in str(error.value) and "real.npz" in str(error.value)
    counted()
    # Where no distance is asked for, whose statistics they are says nothing.
    files = opened(tmp_path, NO_STATISTICS["another network"][0])
    plan(tiny, tiny, Instruments(ModuleFeatures(Means(), "means"), files), ["fid2fp", "is"], COUNT)


def test_statistics_of_another_network_leave_the_images(
    subject: Subject, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    five = {"mu": RANDOM.random(5), "sigma": covariance(5)}
    document = measured(subject, opened(tmp_path, {"arr_0": PIXELS, **five}), "fid")
    assert (
        document["metrics"]
        == measured(subject, opened(tmp_path, {"arr_0": PIXELS}), "fid")["metrics"]
    )
    assert document["taken_from"]["fid"] == "9 samples against 11 images of real.npz"
    assert (
        "mu is of 5 features, network 'means' gives 3, so FID is taken against the 11 images"
        in (document["warnings"][0])
    )
    counted()
    document = measured(subject, opened(tmp_path, {"arr_0": PIXELS, **POOLED}), "fid", "sfid")
    assert document["taken_from"] == {
        "fid": "9 samples against mu and sigma of real.npz",
        "sfid": "9 samples against 11 images of real.npz",
    }


def test_few_samples_are_told_by_their_own_number(
    tiny: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """Of how many images published statistics are, nobody knows; it is not two."""
    files = opened(tmp_path, POOLED)
    for count, told in ((3, True), (COUNT, False)):
        counted()
        samples = sample_set(tiny, tmp_path / str(count), count=count)
        warnings = measured(Subject(tiny, samples), files, "fid")["warnings"]
        assert bool(warnings) == told
        assert not told or f"from {count} images with 3 features" in warnings[0]


def test_the_resize_of_the_suite_is_told(
    subject: Subject, tmp_path: Path, counted: Callable[[], None]
) -> None:
    for name, told in (("inception", True), ("inception-adm", False)):
        counted()
        warnings = measured(subject, opened(tmp_path, SUITE), "fid", name=name)["warnings"]
        assert bool(warnings) == told
        assert not told or "which resizes as inception-adm does" in warnings[0]
