"""`varptq analyze` as a user meets it: files, tables, a config that can be quantized, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

import varptq
from helpers.cli_calls import run
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig

# One worker for the whole file: the model is analyzed once.
pytestmark = pytest.mark.xdist_group("cli-analyze")

PICTURES = ("attention", "costs", "scales", "sensitivity", "suggestion")
FILES = sorted(["analysis.json", "mixed.json", *(f"{name}.png" for name in PICTURES)])


@pytest.fixture(scope="module")
def model(
    make_tiny: Callable[..., Pipeline], tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A tiny model of one block as two checkpoint files."""
    tiny = make_tiny(depth=1)
    folder, words = tmp_path_factory.mktemp("tiny"), []
    for part, network in (("var", tiny.var), ("vae", tiny.vae)):
        save_file(network.state_dict(), folder / f"{part}.safetensors")
        words += [f"--{part}", str(folder / f"{part}.safetensors")]
    return words


@pytest.fixture(scope="module")
def analyzed(
    model: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The tiny model analyzed, and the document printed."""
    folder = tmp_path_factory.mktemp("analyze") / "out"
    ran = run("analyze", *model, "--images", 2, "--widths", "4", "--out", folder, "--json")
    assert ran.code == 0, ran.err
    assert "sensitivity: done" in ran.err
    return folder, json.loads(ran.out)


@pytest.mark.slow
def test_the_folder_holds_numbers_a_config_and_pictures(
    analyzed: tuple[Path, dict[str, Any]],
) -> None:
    folder, document = analyzed
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert json.loads((folder / "analysis.json").read_text()) == document
    for name in PICTURES:
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300


@pytest.mark.slow
def test_the_suggestion_gains_on_other_images(analyzed: tuple[Path, dict[str, Any]]) -> None:
    found, base = analyzed[1]["suggestion"], analyzed[1]["base"]
    assert found["verified"]["mixed"]["kl"] < found["verified"]["base"]["kl"]
    assert base["bops"] < found["bops"] <= 1.1 * base["bops"]


@pytest.mark.slow
def test_the_mixed_config_can_be_quantized(
    analyzed: tuple[Path, dict[str, Any]], model: list[str], tmp_path: Path
) -> None:
    folder, document = analyzed
    words = ("--method", "rtn", "--config", folder / "mixed.json", "--out", tmp_path / "a")
    assert run("quantize", *model, *words).code == 0
    account = json.loads(run("info", tmp_path / "a", "--json").out)
    assert account["bops"]["total"] == document["suggestion"]["bops"]
    assert account["sizes"]["transformer"]["bytes"] == document["suggestion"]["bytes"]


@pytest.mark.slow
def test_tables_and_a_budget_in_bytes(model: list[str], tmp_path: Path) -> None:
    out = ("--images", 1, "--out", tmp_path / "a")
    words = (*out, "--budget-size", "1.2", "--config", "w4a8+paper")
    ran = run("analyze", *model, *words)
    assert ran.code == 0, ran.err
    for word in ("alone at 8", "alone at 4", "cost in config", "probabilities", "size 1.2", "x"):
        assert word in ran.out
    mixed = QuantConfig.from_file(tmp_path / "a" / "mixed.json")
    document = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert mixed.name == "w4a8+paper+mixed"
    assert {pick["operand"] for pick in document["suggestion"]["picks"]} == {"weight"}
    again = run("analyze", *model, *words)
    assert (again.code, again.out) == (2, "") and "exists and is not empty" in again.err
    # The same folder by force, and a size in megabytes.
    words = (*out, "--force", "--widths", "4", "--budget-size", "1MB")
    assert run("analyze", *model, *words).code == 0
    document = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert document["suggestion"]["limit"] == 1_000_000
    assert document["suggestion"]["bytes"] <= 1_000_000


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("demo --budget-bops 0.9", "budget 0.9: expected a ratio of at least 1"),
        ("demo --budget-bops nan", "budget nan"),
        ("demo --budget-size 1.1 --budget-bops 1.1", "budget: both"),
        ("demo --budget-size small", "budget 'small': expected a ratio or a size"),
        ("demo --budget-size 0MB", "budget '0MB': expected a size above 0"),
        ("demo --budget-size 2MB", "budget 2.00 MB: the config itself takes"),
        ("demo --widths 4,x", "widths '4,x'"),
        ("demo --widths 9", "widths"),
        ("demo --images 0", "images is 0"),
        ("demo --config int4", "preset 'int4'"),
        ("demo --seed -1", "'--seed'"),
        ("{here}", "expected a float model"),
        ("nowhere", "model 'nowhere': neither"),
        ("", "model: give one of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(line: str, expected: str, tmp_path: Path) -> None:
    words = line.format(here=tmp_path).split()
    ran = run("analyze", *words, "--out", tmp_path / "new")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert expected in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_python_call_gives_the_same(
    analyzed: tuple[Path, dict[str, Any]], model: list[str]
) -> None:
    from varptq.analyze.analyze import AnalysisConfig, analyze

    pipe = varptq.load_model(var=model[1], vae=model[3])
    settings = AnalysisConfig(images=2, widths=(4,))
    document = analyze(pipe, QuantConfig.preset("w4a4"), settings=settings).document
    assert {**analyzed[1], "seconds": 0} == {**json.loads(json.dumps(document)), "seconds": 0}


@pytest.mark.slow
def test_a_frontier_writes_a_config_for_each_budget(model: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    budget = ("--frontier", "--budget-bops", 1.15, "--images", 2)
    ran = run("analyze", *model, *budget, "--out", out)
    assert ran.code == 0, ran.err
    assert "blocks.*.attn.proj" in ran.out and "KL, calibrated" in ran.out
    assert sorted(p.name for p in out.iterdir()) == [
        *("bops1.15.json", "frontier.json", "frontier.png")
    ]
    document = json.loads((out / "frontier.json").read_text())
    assert document["chosen"]["bops1.15"]["bops"] <= 1.15
    config = QuantConfig.from_dict(json.loads((out / "bops1.15.json").read_text()))
    assert config.name == "frontier-bops1.15"
    ran = run("analyze", *model, "--frontier", "--budget-bops", 0.01, "--out", tmp_path / "none")
    assert ran.code == 2 and "budget bops0.01: 0.01 times the bops of w4a4+paper" in ran.err
    assert not (tmp_path / "none").exists()
