"""`evaluate` against the measures it is made of, computed on everything at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varptq.calibrate.quantize import quantize
from varptq.errors import InputError
from varptq.evaluate.catalogue import METRICS, NEEDS
from varptq.evaluate.evaluate import Subject, evaluate
from varptq.evaluate.features import Features, ModuleFeatures
from varptq.evaluate.frechet import Gaussian, bias_of_means, frechet_distance
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.paired import psnr
from varptq.evaluate.prdc import precision_recall
from varptq.evaluate.preflight import Instruments, plan
from varptq.evaluate.sampling import sample_set
from varptq.evaluate.scores import inception_score
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import SamplingSettings
from varptq.pictures import Pixels
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline

SETTINGS = SamplingSettings(cfg=2, top_k=20)
COUNT, DIM = 13, 3
# Sums in float64, cut into pieces here and not there.
EXACT = 1e-9


class Means(nn.Module):
    """Three pooled features, two spatial ones, and probabilities of three classes."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = images_B3HW.mean((2, 3))
        return means, images_B3HW[:, :2, 0, 0], (5 * means).softmax(-1)


class Encoder:
    """A stand-in for CLIP: brightness against the length of the text."""

    def __call__(self, pixels_BHW3: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        images = pixels_BHW3.float().mean((1, 2))
        return images, torch.tensor([[len(text), 1.0, 2.0] for text in texts])


NETWORK = ModuleFeatures(Means(), "means")


def sampled(pipe: Pipeline, folder: Path, **changes: Any) -> Subject:
    asked = {"count": COUNT, "seed": 3, "settings": SETTINGS, "shard_size": 5, **changes}
    return Subject(pipe, sample_set(pipe, folder, **asked))


@pytest.fixture(scope="module")
def quantized(tiny: Pipeline) -> QuantizedPipeline:
    return quantize(tiny, QuantConfig.preset("w4a4+paper"), method="rtn")


@pytest.fixture(scope="module")
def pair(
    tiny: Pipeline, quantized: QuantizedPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Subject, Subject]:
    folder = tmp_path_factory.mktemp("samples")
    return sampled(quantized, folder / "quantized"), sampled(tiny, folder / "float")


def images(subject: Subject) -> Pixels:
    return np.concatenate([shard.images for shard in subject.samples.shards()])


def features(subject: Subject) -> Features:
    return NETWORK(torch.from_numpy(images(subject)))


@pytest.mark.slow
def test_token_metrics_are_those_of_all_images_at_once(pair: tuple[Subject, Subject]) -> None:
    ours, theirs = pair
    document = evaluate(ours, theirs, token_images=11)
    labels, tokens = theirs.samples.head(11)
    expected = token_fidelity(theirs.pipe, ours.pipe, labels, tokens, 2, 20, 0.96).to_dict()
    for name in ("kl", "kl_filtered", "top1"):
        assert document["metrics"][name] == pytest.approx(expected[name], rel=1e-5)
        assert document["per_scale"][name] == pytest.approx(expected[f"{name}_per_scale"], rel=1e-5)
    assert document["settings"]["token_images"] == 11
    assert document["metrics"]["kl"] > 0


def test_pairs_are_compared_image_by_image(pair: tuple[Subject, Subject]) -> None:
    ours, theirs = pair
    document = evaluate(ours, theirs, metrics=["psnr", "token_agreement"])
    assert list(document["metrics"]) == ["token_agreement", "psnr"]
    expected = psnr(images(ours), images(theirs))
    assert document["metrics"]["psnr"] == pytest.approx(expected, abs=EXACT)
    tokens = [subject.samples.head(COUNT)[1] for subject in pair]
    equal = (tokens[0] == tokens[1]).double()
    assert document["metrics"]["token_agreement"] == pytest.approx(float(equal.mean()), abs=EXACT)
    assert document["per_scale"] == {
        "sides": [1, 2, 3],
        "token_agreement": pytest.approx(
            [float(equal[:, part].mean()) for part in ours.pipe.scales.slices()], abs=EXACT
        ),
    }


def test_codebook_frequencies_are_counted(pair: tuple[Subject, Subject]) -> None:
    found = evaluate(*pair, metrics=["psnr"])["codebook"]
    shares = []
    for subject, name in zip(pair, ("counts", "float_counts"), strict=True):
        counts = np.bincount(subject.samples.head(COUNT)[1].flatten(), minlength=32)
        assert found[name] == counts.tolist()
        shares.append(counts / counts.sum())
    assert found["distance"] == pytest.approx(np.abs(shares[0] - shares[1]).sum(), abs=EXACT)


@pytest.mark.slow
def test_distributions_are_compared_on_features(
    pair: tuple[Subject, Subject], tmp_path: Path
) -> None:
    real = np.random.default_rng(0).integers(0, 256, (17, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=real)
    tools = Instruments(NETWORK, ImageFiles.open(tmp_path / "real.npz"))
    document = evaluate(*pair, instruments=tools)
    ours, floats = (features(subject) for subject in pair)
    theirs = NETWORK(torch.from_numpy(real))
    for name, found in (("metrics", ours), ("float_metrics", floats)):
        expected = {
            "fid": frechet_distance(Gaussian.of(found.pooled), Gaussian.of(theirs.pooled)),
            "sfid": frechet_distance(Gaussian.of(found.spatial), Gaussian.of(theirs.spatial)),
            "is": inception_score(found.probabilities),
        }
        pr = precision_recall(theirs.pooled, found.pooled)
        expected |= dict(zip(("precision", "recall"), pr, strict=True))
        got = {key: document[name][key] for key in expected}
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-9)
    between = frechet_distance(Gaussian.of(ours.pooled), Gaussian.of(floats.pooled))
    assert document["metrics"]["fid2fp"] == pytest.approx(between, rel=1e-6, abs=1e-9)
    assert "fid2fp" not in document["float_metrics"]
    assert document["settings"]["network"] == "means"
    assert document["settings"]["reference_images"] == 17
    assert document["warnings"] == []


def test_few_images_and_sorted_files_are_warned_of(
    pair: tuple[Subject, Subject], tmp_path: Path
) -> None:
    real = torch.from_numpy(images(pair[0])[:3])
    np.savez(tmp_path / "a.npz", arr_0=real.numpy(), arr_1=np.array([0, 0, 1]))
    tools = Instruments(NETWORK, ImageFiles.open(tmp_path / "a.npz"))
    document = evaluate(*pair, instruments=tools, metrics=["fid"])
    assert [text.split(":")[0].split()[0] for text in document["warnings"]] == ["images", "Fréchet"]
    bias = bias_of_means(Gaussian.of(features(pair[0]).pooled), Gaussian.of(NETWORK(real).pooled))
    assert "3 images with 3 features" in document["warnings"][1]
    assert f"too large, by about {bias:.2g} from the means" in document["warnings"][1]


def test_a_model_beside_itself_is_identical(pair: tuple[Subject, Subject]) -> None:
    theirs = pair[1]
    document = evaluate(theirs, theirs, instruments=Instruments(NETWORK))
    found = document["metrics"]
    assert found["psnr"] is None
    assert (found["top1"], found["token_agreement"]) == (1, 1)
    assert max(found["kl"], found["kl_filtered"], found["fid2fp"]) < EXACT
    assert document["codebook"]["distance"] == 0


def test_clip_scores_both_models(pair: tuple[Subject, Subject]) -> None:
    document = evaluate(*pair, instruments=Instruments(clip=Encoder()), metrics=["clip"])
    assert 0 < document["metrics"]["clip"] <= 100
    assert document["float_metrics"]["clip"] != document["metrics"]["clip"]
    assert document["codebook"]["counts"]


def test_the_document_is_plain_and_says_what_made_it(pair: tuple[Subject, Subject]) -> None:
    document = evaluate(*pair)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["title"], document["kind"]) == ("tiny w4a4+paper", "quantized")
    assert document["compared_with"] == "tiny"
    assert document["settings"]["seed"] == 3 and document["settings"]["count"] == COUNT
    assert document["settings"]["sampling"]["top_k"] == 20
    assert document["checksums"]["samples"] == pair[0].samples.sha256()
    assert {"model", "float model", "float samples"} < document["checksums"].keys()
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["runtime"] == "simulated"


def test_what_is_missing_is_said(pair: tuple[Subject, Subject]) -> None:
    document = evaluate(*pair)
    assert {*document["metrics"], *document["left_out"]} == set(METRICS)
    # The images have 6 x 6 pixels.
    assert document["left_out"]["ssim"] == NEEDS["side11"]
    assert document["left_out"]["fid2fp"] == document["left_out"]["is"] == NEEDS["network"]
    alone = evaluate(pair[1], instruments=Instruments(NETWORK))
    assert list(alone["metrics"]) == ["is"] and alone["compared_with"] is None
    assert alone["left_out"]["kl"] == NEEDS["pair"]
    assert "float_counts" not in alone["codebook"]


@pytest.mark.parametrize(
    ("metrics", "with_float", "expected"),
    [
        (["kl", "magic"], True, "metric 'magic': unknown; metrics are kl,"),
        (["kl"], False, "metric 'kl': needs the float model"),
        (["psnr", "fid2fp"], True, "metric 'fid2fp': needs a feature network"),
        (["ssim"], True, "metric 'ssim': needs images of at least 11"),
        (["lpips"], True, "metric 'lpips': needs the LPIPS weights"),
        ([], True, "metrics: none given"),
        (None, False, "metrics: none can be computed"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_sampling(
    tiny: Pipeline,
    quantized: QuantizedPipeline,
    metrics: list[str] | None,
    with_float: bool,
    expected: str,
) -> None:
    with pytest.raises(InputError, match=expected):
        plan(quantized, tiny if with_float else None, Instruments(), metrics, COUNT)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed is 3 and 4"),
        ({"count": 12}, "count is 13 and 12"),
        ({"shard_size": 6}, "shard_size is 5 and 6"),
        ({"settings": SamplingSettings()}, "sampling is"),
    ],
)
def test_samples_made_differently_are_not_compared(
    tiny: Pipeline,
    pair: tuple[Subject, Subject],
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(InputError, match=named):
        evaluate(pair[0], sampled(tiny, tmp_path, **changes))


def test_token_images_must_be_positive(pair: tuple[Subject, Subject]) -> None:
    with pytest.raises(InputError, match="token_images 0"):
        evaluate(*pair, token_images=0)
