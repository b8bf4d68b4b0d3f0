"""The model card of an artifact: its own facts, metadata that a YAML reader takes, no markup from
names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from varptq.artifact import load, save
from varptq.artifact.card import NO_LICENCE, PICTURE_FILE, Quality, card, is_edited
from varptq.artifact.load import read_config
from varptq.artifact.save import document_of
from varptq.models.presets import PRESETS
from varptq.quant.pipeline import QuantizedPipeline
from varptq.readable import megabytes


def metadata(text: str) -> dict[str, Any]:
    _, header, _ = text.split("---\n", 2)
    return yaml.safe_load(header)


def row(text: str, name: str) -> str:
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return found.split(" | ", 1)[1].removesuffix(" |")


def test_save_writes_it_and_load_does_not_read_it(
    quantized: QuantizedPipeline, tmp_path: Path
) -> None:
    folder = save(quantized, tmp_path / "model")
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8")
    assert text == card(read_config(folder)[0]) and not is_edited(text)
    path.unlink()
    assert load(folder).name == "tiny"


def test_the_facts_are_those_of_the_artifact(quantized: QuantizedPipeline) -> None:
    document = document_of(quantized)
    text = card(document, "org/name")
    sizes = document.sizes.values()
    full = megabytes(sum(size["float32_bytes"] for size in sizes))
    whole = megabytes(sum(size["bytes"] for size in sizes))
    assert row(text, "size") == f"{whole}; {full} in float32"
    assert "`w4a4+paper`, `rtn`" in row(text, "config, method")
    assert row(text, "classes") == "3: a, b, ç"
    assert row(text, "SHA-256 of var") == "`seed 0`"
    assert 'pipe = varptq.load("org/name")' in text
    assert 'varptq.generate(pipe, ["a"], seed=0)' in text
    assert metadata(text) == {
        "library_name": "varptq",
        "tags": ["varptq", "quantized", "image-generation", "var"],
    }


def test_the_licence_is_said_where_it_is_known(quantized: QuantizedPipeline) -> None:
    assert row(card(document_of(quantized)), "licence") == NO_LICENCE
    released = replace(quantized, name="var-d16", sources={"var": "0" * 64})
    text = card(document_of(released))
    assert metadata(text)["license"] == "mit"
    assert metadata(text)["base_model"] == PRESETS["var-d16"].repo
    assert row(text, "source") == "`var-d16`, of `FoundationVision/var`"
    # Random weights of that shape are nobody's.
    random = card(document_of(replace(released, sources={"var": "random, seed 0"})))
    assert "random weights" in row(random, "source") and "license" not in metadata(random)


@pytest.mark.parametrize(
    "name", ["a | b", "<script>x</script>", "two\n\n# lines", "---\nlicense: x"]
)
def test_names_become_no_markup(quantized: QuantizedPipeline, name: str) -> None:
    hostile = replace(quantized, name=name, class_names=(name, "b", "c"))
    text, usual = (card(document_of(one)) for one in (hostile, quantized))
    assert "<script" not in text.replace(f'["{name}"]', "")
    assert text.count("\n") == usual.count("\n")
    assert metadata(text) == metadata(usual)


def test_figures_and_edits(quantized: QuantizedPipeline) -> None:
    quality = Quality([("PSNR", "16.58 dB", "")], "From 10 images.", picture=True)
    text = card(document_of(quantized), "org/name", quality)
    assert "| PSNR | 16.58 dB |  |" in text and f"({PICTURE_FILE})" in text
    assert not is_edited(text)
    assert not is_edited(text.rstrip("\n"))
    for edited in (text.replace("PSNR", "psnr"), text + "more\n", "", "# Mine\n"):
        assert is_edited(edited)
