"""`varptq evaluate` as a user meets it: what it writes, going on, and every way to be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import varptq
from helpers.cli_calls import run, succeed
from varptq.evaluate.image_files import ImageFiles
from varptq.models.presets import ASSETS

# One worker for the whole file: the artifacts are made once.
pytestmark = pytest.mark.xdist_group("cli-evaluate")

DEMO = ASSETS / "demo"
VAR, VAE = DEMO / "var_demo.safetensors", DEMO / "vae_demo.safetensors"
SAMPLING = ("--cfg", 4, "--top-k", 100, "--seed", 2)


def save(pipe: varptq.Pipeline, folder: Path, method: str = "rtn") -> Path:
    calibration = varptq.CalibrationConfig(num_samples=2)
    config = varptq.QuantConfig.preset("w4a4+groups")
    varptq.save(varptq.quantize(pipe, config, method=method, calibration=calibration), folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "w4a4"
    return save(varptq.load_model("demo"), folder, "rtn+shift+resample")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact called demo that was not made of the demo model."""
    folder = tmp_path_factory.mktemp("foreign") / "w4a4"
    return save(varptq.build_model("demo"), folder)


@pytest.fixture(scope="module")
def evaluated(
    artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    words = ("evaluate", artifact, "--count", 5, *SAMPLING, "--out", out, "--export", "npz")
    return out, succeed(*words, "--json").document


@pytest.mark.slow
def test_everything_is_written(evaluated: tuple[Path, dict[str, Any]], artifact: Path) -> None:
    out, document = evaluated
    names = sorted(path.name for path in out.iterdir())
    assert names == ["float.npz", "metrics.json", "quantized.npz", "report.html", "samples"]
    assert json.loads((out / "metrics.json").read_text()) == document
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<img") == 10
    for anchor in ("quality", "images", "scales", "codebook", "size", "bops", "theta"):
        assert f'<section id="{anchor}">' in page
    assert "calibration tokens were drawn again" in page
    files = {name: ImageFiles.open(out / f"{name}.npz") for name in ("quantized", "float")}
    assert {name: images.count for name, images in files.items()} == {"quantized": 5, "float": 5}


@pytest.mark.slow
def test_the_document_has_the_numbers_and_what_made_them(
    evaluated: tuple[Path, dict[str, Any]],
) -> None:
    out, document = evaluated
    found = document["metrics"]
    names = ["kl", "kl_filtered", "top1", "token_agreement", "psnr", "ssim"]
    assert list(found) == names and all(0 < value < 50 for value in found.values())
    assert len(document["per_scale"]["kl"]) == len(document["per_scale"]["top1"]) == 6
    assert sum(document["codebook"]["counts"]) == 5 * 130
    assert document["settings"]["sampling"]["cfg"] == 4 and document["settings"]["seed"] == 2
    assert document["compared_with"] == "demo" and document["warnings"] == []
    assert document["model"]["kind"] == "quantized w4a4+groups"
    assert len(document["model"]["copies"]) == 6 * 6
    assert "--network" in document["left_out"]["fid2fp"]
    with np.load(out / "samples" / "quantized" / "00000.npz") as shard:
        parts = (shard["images"], shard["labels"], shard["tokens"])
        digest = b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)
    assert document["checksums"]["samples"] == hashlib.sha256(digest).hexdigest()


@pytest.mark.slow
def test_a_second_run_goes_on_and_prints_a_table(
    evaluated: tuple[Path, dict[str, Any]], artifact: Path
) -> None:
    out, document = evaluated
    shard = out / "samples" / "float" / "00000.npz"
    before, report = shard.stat().st_mtime_ns, (out / "report.html").read_bytes()
    words = ("evaluate", artifact, "--count", 5, *SAMPLING, "--out", out)
    ran = succeed(*words)
    for word in ("demo w4a4", "KL divergence, filtered", "Top-1 agreement", " dB", "5, seed 2"):
        assert word in ran.out
    assert shard.stat().st_mtime_ns == before
    assert (out / "report.html").read_bytes() == report
    refused = run(*words[:-4], "--seed", 3, "--out", out)
    assert refused.code == 2 and "seed 2, not 3; choose another folder or force" in refused.err
    assert json.loads((out / "metrics.json").read_text()) == document


@pytest.mark.slow
def test_one_metric_of_an_artifact_beside_files(artifact: Path, tmp_path: Path) -> None:
    words = ("--var", VAR, "--vae", VAE, "--metrics", "psnr, token_agreement", "--count", 2)
    document = succeed(
        "evaluate", artifact, *words, "--out", tmp_path, "--export", "png", "--json"
    ).document
    assert list(document["metrics"]) == ["token_agreement", "psnr"]
    assert document["compared_with"] == "var_demo" and document["warnings"] == []
    pictures = sorted(path.name for path in (tmp_path / "quantized").iterdir())
    assert pictures == ["000000.png", "000001.png"]


@pytest.mark.slow
def test_a_float_model_of_another_kind_is_refused_before_sampling(
    artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = run("evaluate", artifact, "--against", "demo-text", "--count", 1, "--out", out)
    assert ran.code == 2 and "model 'demo-text': reads texts, and the artifact of" in ran.err
    assert ran.err.count("\n") == 1 and not out.exists()


@pytest.mark.slow
def test_a_float_model_that_is_another_one_is_warned_of(foreign: Path, tmp_path: Path) -> None:
    words = ("evaluate", foreign, "--count", 1, "--metrics", "psnr", "--out")
    ran = run(*words, tmp_path / "a")
    assert ran.code == 2 and "metric 'psnr': needs the float model" in ran.err
    ran = succeed(*words, tmp_path / "b", "--against", "demo")
    assert "warning: model 'demo': not the weights that the artifact was made from" in ran.err
    ran = succeed(*words, tmp_path / "c", "--random", "demo")
    assert "warning" not in ran.err


@pytest.mark.slow
def test_features_of_a_float_model_by_itself(tmp_path: Path) -> None:
    import torch

    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    real = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    moments = {"mu": np.full(3, 0.5), "sigma": np.eye(3)}
    np.savez(tmp_path / "real.npz", arr_0=real, arr_1=np.arange(5), **moments)
    tools = ("--network", f"module:{tmp_path}/means.pt", "--reference", tmp_path / "real.npz")
    words = ("evaluate", "demo", *tools, "--count", 5, "--out", tmp_path / "out")
    ran = succeed(*words, "--json")
    document = ran.document
    assert list(document["metrics"]) == ["fid", "precision", "recall"]
    assert document["compared_with"] is None and document["float_metrics"] == {}
    assert ran.err.count("warning: ") == 1 and "real.npz: sorted by label" in ran.err
    for name, file in (("feature network", "means.pt"), ("real images", "real.npz")):
        content = (tmp_path / file).read_bytes()
        assert document["checksums"][name] == hashlib.sha256(content).hexdigest()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "FID (means)" in page and "FID: 5 samples against mu and sigma of real.npz" in page
    assert "Recall: 5 samples against 5 images of real.npz" in page
    assert "computed from" in succeed(*words).out
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["float"]


BAD = [
    ("", "model: give one of"),
    ("nowhere", "model 'nowhere': neither"),
    ("demo", "metrics: none can be computed"),
    ("demo --against demo", "model 'demo': a float model, which is compared with nothing"),
    ("demo --random demo", "a float model"),
    ("--against demo", "against 'demo': no model to measure"),
    ("{artifact} --against {artifact}", "expected a float model"),
    ("{artifact} --against demo --random demo", "model: give one of"),
    ("{artifact} --against nowhere", "model 'nowhere': neither"),
    ("{artifact} --var a.pth", "vae="),
    ("{artifact} --metrics kl,magic", "metric 'magic': unknown; metrics are kl,"),
    ("{artifact} --metrics kl,", "metric '': unknown"),
    ("{artifact} --metrics fid", "metric 'fid': needs a feature network (--network"),
    ("{artifact} --network magic:a.pt", "network 'magic:a.pt': unknown"),
    ("{artifact} --network inception:nowhere.pt", "nowhere.pt"),
    ("{artifact} --reference nowhere.npz", "images nowhere.npz: cannot be read"),
    ("{artifact} --lpips nowhere.safetensors", "nowhere.safetensors"),
    ("{artifact} --count 0", "'--count'"),
    ("{artifact} --cfg -1", "cfg is -1"),
    ("{artifact} --top-p 2", "top_p is 2"),
    ("{artifact} --seed -1", "'--seed'"),
    ("{artifact} --batch-size 0", "'--batch-size'"),
    ("{artifact} --export gif", "'--export'"),
    ("{artifact} --runtime warp", "runtime 'warp'"),
    ("{artifact} --device tpu", "device 'tpu'"),
    ("{artifact} --out {here}/file", "file"),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, expected: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    ran = run("evaluate", *line.format(artifact=artifact, here=tmp_path).split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert expected in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
