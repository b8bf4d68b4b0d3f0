"""The command line as a user meets it: what each verb writes and prints, and every way to be wrong.

A mistake ends with exit code 2 and one line on stderr, before anything is computed or written.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import varptq
from helpers.cli_calls import run, succeed
from varptq.cli import demo
from varptq.cli.main import app
from varptq.models.presets import ASSETS
from varptq.pictures import to_pixels

# One worker for the whole file: the artifact is made once.
pytestmark = pytest.mark.xdist_group("cli")

SRC = Path(__file__).parents[2] / "src"
QUICK = ("--samples", "2", "--steps", "2")
DEMO = ASSETS / "demo"
FILES = ("--var", DEMO / "var_demo.safetensors", "--vae", DEMO / "vae_demo.safetensors")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo model quantized to 4 bits, and what the command said about it."""
    folder = tmp_path_factory.mktemp("cli") / "artifact"
    words = ("--config", "w4a4+groups", "--method", "sas", *QUICK)
    return folder, succeed("quantize", "demo", *words, "--out", folder, "--json").document


@pytest.fixture(scope="module")
def artifact(quantized: tuple[Path, dict[str, Any]]) -> Path:
    return quantized[0]


@pytest.mark.slow
def test_quantize_says_what_it_made(quantized: tuple[Path, dict[str, Any]]) -> None:
    folder, document = quantized
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert (document["model"], document["config"]) == ("demo", "w4a4+groups")
    assert document["method"] == "sas"
    assert document["calibration"]["num_samples"] == document["calibration"]["steps"] == 2
    transformer = document["sizes"]["transformer"]
    assert 6 < transformer["float32_bytes"] / transformer["bytes"] < 8
    assert document["theta"]["fraction"] <= document["theta"]["alpha"] == 0.01
    assert document["resampling"]["l1_after"] < document["resampling"]["l1_before"]
    assert document["units"]["count"] == len(document["units"]["units"]) == 21
    assert document["seconds"] > 0


@pytest.mark.slow
def test_a_dry_run_says_everything_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized: tuple[Path, dict[str, Any]]
) -> None:
    """Also where the artifact goes and what it weighs: as much as when it is made."""
    monkeypatch.chdir(tmp_path)
    made = quantized[1]
    words = ("--config", made["config"], "--method", "rtn", "--samples", 2, "--dry-run")
    document = succeed("quantize", "demo", *words, "--json").document
    assert list(tmp_path.iterdir()) == []
    assert document["sizes"] == made["sizes"]
    assert document["forecast"]["seconds"] > 0 and document["forecast"]["memory"] > 0
    ran = succeed("quantize", "demo", *words)
    assert f"demo-{made['config']}" in ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_with_nothing_but_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the number of images, for the sake of time: the defaults are said before, and
    afterwards what to do next."""
    monkeypatch.chdir(tmp_path)
    ran = succeed("quantize", "demo", "--method", "rtn", "--samples", 1)
    before = ran.err.index("calibration samples")
    for word in ("config w4a4, the default", "work rtn, 1 image", "time ", "memory about "):
        assert -1 < ran.err.find(word) < before, word
    assert (tmp_path / "demo-w4a4" / "config.json").is_file()
    text = " ".join(ran.out.replace("│", " ").split())
    assert "varptq generate demo-w4a4 --classes 0,1,2" in text and "the float model" in text


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo model with its weights rounded to nearest, in a second, and the table printed."""
    folder = tmp_path_factory.mktemp("nearest") / "artifact"
    words = ("--method", "rtn", "--config", "w4a4+paper", "--out", folder)
    return folder, succeed("quantize", "--model", "demo", *words).out


def test_quantize_prints_a_table(nearest: tuple[Path, str]) -> None:
    folder, out = nearest
    words = ("demo", "w4a4+paper, rtn", "4.28 bits each", "nearest rounding", str(folder)[:20])
    for word in words:
        assert word in out


@pytest.mark.slow
def test_quantize_files_with_a_config_and_calibration_from_files(tmp_path: Path) -> None:
    config, calibration = tmp_path / "config.json", tmp_path / "calibration.yaml"
    config.write_text(json.dumps(varptq.QuantConfig.preset("w6a8+paper+litevar").to_dict()))
    calibration.write_text("num_samples: 3\nsteps: 1\n")
    words = ("--config", config, "--calibration", calibration, "--budget", "0.02", "--steps", "2")
    out = tmp_path / "new" / "artifact"
    document = succeed("quantize", *FILES, *words, "--out", out, "--json").document
    assert (document["model"], document["config"]) == ("var_demo", "w6a8+paper+litevar")
    found = {key: document["calibration"][key] for key in ("num_samples", "steps", "budget")}
    assert found == {"num_samples": 3, "steps": 2, "budget": 0.02}


@pytest.mark.slow
def test_group_size_changes_the_weights(tmp_path: Path) -> None:
    words = ("--method", "rtn", "--group-size", 16, "--samples", 2, "--out", tmp_path / "a")
    succeed("quantize", "--random", "demo", *words)
    bits = succeed("info", tmp_path / "a", "--json").document["bits"]
    assert bits["mat_qkv"]["weight"] == "4 bits, codebook, groups of 16"
    assert bits["word_embed"]["weight"] == "8 bits, groups of 16"


@pytest.mark.slow
def test_generate_writes_what_the_api_gives(artifact: Path, tmp_path: Path) -> None:
    settings = ("--seed", 7, "--cfg", 2, "--top-k", 50, "--top-p", 0.9, "--batch-size", 4)
    words = ("--classes", "cat,9, 0", "--count", 2, *settings, "--out", tmp_path / "new", "--json")
    document = succeed("generate", artifact, *words).document
    names = [Path(image["file"]).name for image in document["images"]]
    classes = ["cat", "cat", "truck", "truck", "airplane", "airplane"]
    assert names == [f"{index:04}-{name}.png" for index, name in enumerate(classes)]
    expected = varptq.generate(
        varptq.load(artifact), [3, 3, 9, 9, 0, 0], seed=7, cfg=2, top_k=50, top_p=0.9, batch_size=4
    )
    assert expected.images is not None
    arrays = np.load(document["tokens"])
    assert (arrays["tokens"] == expected.tokens.numpy()).all()
    assert arrays["labels"].tolist() == [image["label"] for image in document["images"]]
    for image, pixels in zip(document["images"], to_pixels(expected.images), strict=True):
        assert (np.asarray(Image.open(image["file"])) == pixels).all()
    assert Image.open(document["grid"]).width > 2 * 128
    assert document["runtime"] == varptq.load(artifact).runtime


def test_generate_one_picture_with_the_float_model(tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    words = ("--classes", "3,ship", "--more-smooth", "--temperature", "0.9", "--out", picture)
    ran = succeed("generate", "demo", *words)
    assert "demo, float" in ran.out and "2 in " in ran.out
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    first = picture.read_bytes()
    assert run("generate", "demo", *words).code == 2
    assert picture.read_bytes() == first
    succeed("generate", "demo", *words, "--force")
    assert picture.read_bytes() == first


def test_force_replaces_files_of_the_same_name_only(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = ("generate", "demo", "--classes", "cat", "--out", tmp_path)
    succeed(*words)
    refused = run(*words)
    assert refused.code == 2 and "grid.png: exists" in refused.err
    succeed(*words, "--force")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_info_of_an_artifact(artifact: Path) -> None:
    document = succeed("info", artifact, "--json").document
    assert document["kind"] == "quantized w4a4+groups"
    assert document["architecture"]["scales"] == [1, 2, 3, 4, 6, 8]
    assert sum(document["bops"]["by_kind"].values()) == document["bops"]["total"]
    assert 14 < document["bops"]["float_total"] / document["bops"]["total"] < 15
    assert document["bits"]["mat_qkv"]["weight"] == "4 bits, groups of 128"
    assert document["bits"]["fc2"]["input"] == "4 bits, groups of 64, centred, rotated by 128"
    assert document["bits"]["attention"]["probability"] == "8 bits, uniform, per token"
    assert [row["keys"] for row in document["duplicated"]] == [1, 5, 14, 30, 66, 130]
    assert all(0 <= row["duplicated"] <= row["keys"] for row in document["duplicated"])
    text = succeed("info", artifact).out
    for word in ("sas, seed 0", "14.98x fewer", "groups of 128", "probability_value", "130"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "name", "sides"),
    [
        (("demo",), "demo", 6),
        (FILES, "var_demo", 6),
        (("--random", "demo"), "demo", 6),
        # Not on this machine: a name is described without its weights.
        (("var-d36",), "var-d36", 10),
    ],
)
def test_info_of_float_models(words: tuple[object, ...], name: str, sides: int) -> None:
    document = succeed("info", *words, "--json").document
    assert (document["name"], document["kind"]) == (name, "float")
    assert len(document["architecture"]["scales"]) == sides
    assert document["bops"]["total"] == document["bops"]["float_total"]
    assert set(document["bits"]["proj"].values()) == {"float"}
    assert "theta" not in document
    assert "in 16-bit" not in succeed("info", *words).out


@pytest.mark.slow
def test_demo_compares_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SRC))
    words = ("demo", "--out", tmp_path / "demo", *QUICK, "--images", 1, "--json")
    document = succeed(*words).document
    assert document["fidelity"]["num_images"] == 10
    assert 0 < document["fidelity"]["kl_filtered"] < 5
    assert 0 <= document["token_agreement"] < 1 and document["psnr"] > 0
    assert list(document["seconds"]) == [
        "calibrate and quantize",
        "save the artifact",
        "sample the float model",
        "reload and sample in a new process",
        "compare next-token distributions",
    ]
    files = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert files == ["artifact", "comparison.png", "summary.txt"]
    assert "KL(float || quantized)" in (tmp_path / "demo/summary.txt").read_text()
    assert min(Image.open(tmp_path / "demo/comparison.png").size) > 300
    assert run("demo", "--out", tmp_path / "demo/summary.txt", *QUICK).code == 2


@pytest.mark.slow
def test_demo_with_texts_asks_both_models_for_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SRC))
    monkeypatch.chdir(tmp_path)
    # Eight bits, so that both models agree unless they are asked for different things.
    monkeypatch.setattr(demo, "OF_TEXTS", replace(demo.OF_TEXTS, config="w8a8", method="rtn"))
    monkeypatch.setattr(demo, "MAX_PROMPTS", 3)
    document = succeed("demo", "--text", *QUICK, "--images", 1, "--json").document
    assert document["recipe"] | {"model": "demo-text", "cfg": 3.0, "top_k": 0} == document["recipe"]
    assert (document["fidelity"]["num_images"], document["fidelity_cfg"]) == (3, 3.0)
    assert document["token_agreement"] > 0.9
    files = sorted(path.name for path in (tmp_path / "out/demo-text").iterdir())
    assert files == ["artifact", "comparison.png", "summary.txt"]


VAR_FILE, VAE_FILE = "--var {assets}/var_demo.safetensors", "--vae {assets}/vae_demo.safetensors"
BAD_MODELS = [
    ("info", "model: give one of"),
    ("info demo --random demo", "model: give one of"),
    ("info demo --var a.pth", "model: give one of"),
    ("info nowhere", "model 'nowhere': neither"),
    ("info --random var-d17", "unknown model 'var-d17'"),
    ("info --var a.pth", "vae="),
    ("info --var nowhere.pth --vae nowhere.pth", "nowhere.pth"),
    ("info {here}", "config.json"),
]
BAD_QUANTIZE = [
    ("demo --config w1a4", "weight bits 1 not in 2..8"),
    ("demo --config w17a4", "weight bits 17"),
    ("demo --config w4a1", "activation bits 1"),
    ("demo --config w4a17", "activation bits 17"),
    ("demo --config int4", "preset 'int4'"),
    ("demo --config w4a4+magic", "unknown modifier 'magic'"),
    ("demo --config nowhere.json", "nowhere.json: cannot be read"),
    ("demo --config {here}/list.json", "expected a mapping"),
    ("demo --config {here}/unknown.yaml", "unknown field 'bits'"),
    ("demo --config {here}/broken.json", "not valid JSON"),
    ("demo --group-size 96", "layer head: group_size 96"),
    ("demo --group-size 4", "group_size"),
    ("demo --method rtn --samples 1 --group-size 2048", "group_size 2048: wider than every layer"),
    (f"demo --method rtn --dry-run --group-size {10**26}", f"group_size {10**26}: wider than"),
    ("demo --group-size half", "'--group-size'"),
    ("demo --method magic", "method 'magic': unknown"),
    ("demo --method sas+magic", "method 'sas+magic': unknown"),
    ("demo --calibration slow", "calibration preset 'slow': unknown"),
    ("demo --calibration nowhere.yaml", "nowhere.yaml: cannot be read"),
    ("demo --samples 0", "num_samples is 0"),
    ("demo --steps -1", "steps is -1"),
    ("demo --budget -0.1", "budget is -0.1"),
    ("demo --budget nan", "budget is nan"),
    ("demo --seed -1", "'--seed'"),
    ("demo --device tpu", "device 'tpu'"),
    ("demo --device cuda:99", "device 'cuda:99'"),
    ("demo --dtype float8", "dtype 'float8'"),
    ("demo --model demo", "model: both"),
    ("demo --bogus", "No such option: --bogus"),
    ("{here}", "expected a float model"),
    ("", "model: give one of"),
]
BAD_GENERATE = [
    ("demo --classes unicorn", "class 'unicorn': unknown"),
    ("demo --classes 10", "class 10: not in 0..9"),
    ("demo --classes -1", "class -1"),
    ("demo --classes cat,,ship", "classes 'cat,,ship'"),
    (f"{VAR_FILE} {VAE_FILE} --classes cat", "give an id"),
    ("demo --classes cat --cfg text", "'--cfg'"),
    ("demo --classes cat --cfg -1", "cfg is -1"),
    ("demo --classes cat --cfg inf", "cfg is inf"),
    ("demo --classes cat --top-p 2", "top_p is 2"),
    ("demo --classes cat --top-k -1", "top_k is -1"),
    ("demo --classes cat --top-k 1.5", "'--top-k'"),
    ("demo --classes cat --temperature 0", "temperature is 0"),
    ("demo --classes cat --count 0", "'--count'"),
    ("demo --classes cat --count 99999999999999999999", "'--count'"),
    ("demo --classes cat --batch-size 0", "'--batch-size'"),
    ("demo --classes cat --runtime cpu", "runtime 'cpu': only for artifacts"),
    ("{artifact} --classes cat --runtime warp", "runtime 'warp'"),
    ("nowhere --classes cat", "model 'nowhere': neither"),
    ("demo", "'--classes'"),
]
BAD_COMMANDS = [
    ("bogus", "No such command 'bogus'"),
    ("--bogus", "No such option: --bogus"),
    ("demo --images 0 --out {new}", "'--images'"),
    ("edit list.json --model demo --candidates 99999999999999999999 --out {new}", "'--candidates'"),
    ("analyze demo --images 99999999999999999999 --out {new}", "images is 9"),
    ("quantize demo --samples 99999999999999999999 --out {new}", "num_samples is 9"),
    ("demo --steps -1 --out {new}", "steps is -1"),
    ("demo --out {here}/list.json", "list.json"),
    *BAD_MODELS,
    *((f"quantize {words} --out {{new}}", expected) for words, expected in BAD_QUANTIZE),
    *((f"generate {words} --out {{new}}", expected) for words, expected in BAD_GENERATE),
    ("quantize demo --out {here}", "exists and is not empty"),
    ("quantize demo --out {here}/list.json", "is a file, expected a folder"),
    ("quantize demo --force --out {here}", "holds no config.json"),
    ("quantize demo --work {new} --out {new}/artifact", "new: holds --out"),
    ("quantize demo --work {new}/deep/work --out {new}", "work: lies in --out"),
    ("quantize demo --dry-run --work {new}/work --out {new}", "work: lies in --out"),
    ("quantize demo --force --work {artifact}/work --out {artifact}", "work: lies in --out"),
    ("generate demo --classes cat", "'--out'"),
    ("generate demo --classes cat --out {here}/list.json", "list.json"),
    ("generate demo --classes cat --out {here}/list.json/grid.png", "list.json"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_COMMANDS, ids=[line for line, _ in BAD_COMMANDS])
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, expected: str, nearest: tuple[Path, str], tmp_path: Path
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    unknown = {**varptq.QuantConfig.preset("w4a4+paper").to_dict(), "bits": 4}
    (tmp_path / "unknown.yaml").write_text(json.dumps(unknown))
    before = sorted(tmp_path.rglob("*"))
    places = {"here": tmp_path, "new": tmp_path / "new", "artifact": nearest[0], "assets": DEMO}
    ran = run(*(word.format(**places) for word in line.split()))
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert expected in ran.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_what_is_finished(tmp_path: Path, warm: Path) -> None:
    words = ["quantize", "demo", "--samples", "4", "--steps", "100000", "--out", "deep/artifact"]
    process = subprocess.Popen(
        [str(warm / "varptq"), *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("reconstruct"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "error: interrupted" in rest and "Traceback" not in rest
    assert [path.name for path in tmp_path.glob("deep/*")] == ["artifact.work"]
    assert not list(tmp_path.rglob(".varptq-*"))


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("varptq.cli.info.describe", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        app(["info", "demo"])


def test_module_version_and_help() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "varptq", "--version"],
        env={"PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"varptq {varptq.__version__}\n"
    for words in ((), ("--help",), ("-h",)):
        text = succeed(*words).out
        assert all(verb in text for verb in ("quantize", "generate", "info", "demo"))
    assert "--group-size" in succeed("quantize", "--help").out
