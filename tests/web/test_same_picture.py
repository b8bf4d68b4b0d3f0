"""The studio and the command line draw the same picture of the same model, class and seed."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.cli_calls import succeed

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from starlette.testclient import TestClient

from helpers.studio_calls import Caller, drawing, editing, file_data
from helpers.studio_pages import STUDIO
from varptq.web.catalogue import Kind
from varptq.web.generate_tab import example
from varptq.web.server import Options, make_studio, web_app

pytestmark = STUDIO

SEED, COUNT = 7, 2


def defaults(caller: Caller, *labels: str) -> list[Any]:
    """The values that a page starts with."""
    shown = caller.http.get(caller.api.replace("/gradio_api", "/config")).json()["components"]
    values = {part["props"].get("label"): part["props"].get("value") for part in shown}
    return [values[label] for label in labels]


def pixels(file: Any) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize(
    ("key", "words", "word"),
    [("demo", ["demo"], "ship"), ("models/w4a4", ["{models}/w4a4"], "cat")],
    ids=["float", "artifact"],
)
def test_a_seed_draws_the_same_in_both(
    served: Any, tmp_path: Path, key: str, words: list[str], word: str
) -> None:
    caller = Caller(served.address)
    sampling = defaults(caller, "Guidance (cfg)", "Top-k, 0 for all", "Top-p, 1 for all")
    answer = caller.call("generate", key, "nothing", *drawing(word, COUNT, SEED, *sampling))
    assert answer.ok, answer.error
    # Every scale is shown under the same names; the last ones are the finished pictures.
    paths = re.findall(rf'"(/[^"]+/{word}-seed{SEED}-\d\.png)"', json.dumps(answer.outputs))
    last = {Path(path).name: path for path in paths}
    assert sorted(last) == [f"{word}-seed{SEED}-{number}.png" for number in range(COUNT)]
    model = [each.format(models=served.models) for each in words]
    given = ("--classes", word, "--count", COUNT, "--seed", SEED, "--out", tmp_path / "images")
    succeed("generate", *model, *given)
    for number, name in enumerate(sorted(last)):
        drawn = pixels(io.BytesIO(caller.file(last[name]).content))
        written = pixels(tmp_path / "images" / f"{number:04}-{word}.png")
        np.testing.assert_array_equal(drawn, written)


def test_an_edit_is_the_same_in_both(served: Any, tmp_path: Path) -> None:
    """Towards a class, whose guidance the page has a slider for."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    caller = Caller(served.address)
    (cfg,) = defaults(caller, "Guidance (cfg)")
    image = file_data(caller.upload("a.png", buffer.getvalue()))
    rest = editing("Change", "ship", 1, SEED, cfg, "crop", True, 0.0, 0.0, 0.5, 1.0)
    answer = caller.call("edit", "demo", image, None, *rest)
    assert answer.ok, answer.error
    (path,) = set(re.findall(rf'"(/[^"]+/ship-seed{SEED}-0\.png)"', json.dumps(answer.outputs)))
    words = ("--task", "class", "--label", "ship", "--box", "0,0,0.5,1", "--seed", SEED)
    succeed("edit", tmp_path / "a.png", "--model", "demo", *words, "--out", tmp_path / "edited")
    drawn = pixels(io.BytesIO(caller.file(path).content))
    np.testing.assert_array_equal(drawn, pixels(tmp_path / "edited" / "0000.png"))


@pytest.mark.slow
def test_the_first_start_says_how_to_make_a_quantized_model(tmp_path: Path) -> None:
    """What it says can be typed, and is no longer said then."""
    studio = make_studio([], tmp_path / "out")
    line = example(studio.out)
    assert shown(studio, "generate-missing").count(line) == 1
    assert "10 classes, 32 x 32 pixels" in shown(studio, "generate-about")
    assert "10 classes, 32 x 32 pixels" in shown(studio, "edit-about")
    program, *words = shlex.split(line)
    assert program == "varptq"
    succeed(*words, "--method", "rtn", "--samples", 2)
    assert studio.keys(Kind.artifact) == ["out/demo-w4a4"]
    assert shown(studio, "generate-missing") == ""


def shown(studio: Any, element: str) -> str:
    """What a page of the studio starts with in an element."""
    with TestClient(web_app(studio, Options()), base_url="http://localhost") as client:
        parts = client.get("/config").json()["components"]
    (value,) = (part["props"]["value"] for part in parts if part["props"].get("elem_id") == element)
    return value
