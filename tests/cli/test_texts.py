"""The verbs with a model that reads texts: prompts, encoder, sizes, what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import varptq
from helpers.cli_calls import run, succeed
from helpers.few_images import analyze_few
from helpers.infinity_states import PRESET, features, sized
from varptq.cli.model_choice import ModelChoice
from varptq.evaluate.networks.clip import TransformersClip
from varptq.models.presets import PRESETS
from varptq.models.random_files import write_random
from varptq.models.text_encoder import T5Encoder
from varptq.models.texts import TextPrompts

TEXTS = ["a red cat", "two dogs, one ball", "a hen"]
ASKED = TextPrompts.of(features(3, 2, 3), TEXTS)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model by name, and an encoder that gives a row per word."""
    monkeypatch.setitem(PRESETS, "tiny", PRESET)
    monkeypatch.setattr(
        T5Encoder, "features", lambda _, texts: features(*[len(text.split()) for text in texts])
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    varptq.save_features(tmp_path / "prompts.safetensors", ASKED)
    return tmp_path / "prompts.safetensors"


@pytest.mark.slow
def test_texts_become_pictures_named_after_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--prompt", TEXTS[0], "--prompt", TEXTS[1], "--count", 2, "--encoder", tmp_path)
    settings = ("--seed", 3, "--cfg", "4,4,3", "--tau", 0.5, "--negative", "blurry")
    settings = (*settings, "--guide-at", "-1")
    ran = succeed("generate", "--random", "tiny", *words, *settings, "--out", out, "--json")
    names = [Path(image["file"]).name for image in ran.document["images"]]
    slugs = ["a-red-cat", "a-red-cat", "two-dogs-one-ball", "two-dogs-one-ball"]
    assert names == [f"{index:04}-{slug}.png" for index, slug in enumerate(slugs)]
    assert ran.document["images"][0] | {"file": 0} == {"file": 0, "text": TEXTS[0], "tokens": 3}
    assert ran.document["sampling"]["guide_at"] == [-1]
    assert ran.document["sampling"]["cfg"] == [4, 4, 3] and ran.document["size"] == [12, 8]
    pipe = varptq.build_model("tiny")
    asked = TextPrompts.of(features(3, 4)[:2])
    asked = asked[:1].joined(asked[:1]).joined(asked[1:]).joined(asked[1:])
    expected = varptq.generate(
        pipe, asked, negative=features(1), seed=3, cfg=[4, 4, 3], tau=0.5, guide_at=[-1],
        decode=False,
    )  # fmt: skip
    with np.load(ran.document["tokens"], allow_pickle=False) as arrays:
        assert (arrays["tokens"] == expected.tokens.numpy()).all()
        assert arrays["texts"].tolist() == [TEXTS[0]] * 2 + [TEXTS[1]] * 2
        assert arrays["lengths"].tolist() == [3, 3, 4, 4]


@pytest.mark.slow
def test_an_edit_towards_a_text(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 44, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    words = ("--box", "0,0,0.5,1", "--encoder", tmp_path, "--cfg", "4,4,3", "--negative", "blurry")
    to = ("edit", tmp_path / "photo.png", "--random", "tiny", "--prompt", TEXTS[0], *words)
    ran = succeed(*to, "--task", "prompt", "--out", tmp_path / "edited", "--json")
    assert (ran.document["to"], ran.document["negative"]) == (TEXTS[0], "blurry")
    assert ran.document["sampling"]["cfg"] == [4, 4, 3]
    expected = varptq.edit(
        varptq.build_model("tiny"), tmp_path / "photo.png", task="prompt", to=features(3)[0],
        negative=features(1)[0], box=(0, 0, 0.5, 1), cfg=(4, 4, 3),
    )  # fmt: skip
    with np.load(tmp_path / "edited" / "tokens.npz") as arrays:
        assert (arrays["tokens"] == expected.tokens.numpy()).all()
    wrong = ("edit", tmp_path / "photo.png", "--random", "tiny", *words, "--label", "cat")
    assert (
        "label 'cat': model 'tiny' reads texts; give --prompt"
        in run(*wrong, "--out", tmp_path / "wrong").err
    )


@pytest.mark.slow
def test_a_file_and_a_size(file: Path, tmp_path: Path) -> None:
    words = ("--prompts", file, "--size", "84x56", "--cfg", 1, "--out", tmp_path / "grid.png")
    refused = run("generate", "--random", "tiny", *words)
    assert refused.code == 2 and "size 84x56: not one that the model draws" in refused.err
    words = ("--prompts", file, "--size", "0.06M:1.5", "--cfg", 1, "--out", tmp_path / "out")
    succeed("generate", "--random", "tiny", *words)
    pictures = sorted((tmp_path / "out").glob("0*.png"))
    assert [path.stem[5:] for path in pictures] == ["a-red-cat", "two-dogs-one-ball", "a-hen"]
    assert Image.open(pictures[0]).size == (56, 84)


class Scorer:
    """A stand-in for CLIP to which images are alike and one text of three fits all of them."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __call__(self, pixels: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.asked |= set(texts)
        return torch.tensor([[1.0, 0]] * len(pixels)), torch.tensor(
            [[1.0, 0] if text == TEXTS[0] else [0, 1.0] for text in texts]
        )


@pytest.mark.slow
def test_from_a_model_to_its_report(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = dataclasses.replace(PRESET, transformer_arch=sized(depth=1))
    monkeypatch.setitem(PRESETS, "tiny", shallow)
    made = ("--config", "w4a4", "--method", "rtn", "--samples", 3, "--out", tmp_path / "q")
    refused = run("quantize", "--random", "tiny", *made, "--encoder", tmp_path)
    assert refused.code == 2 and "expected at most 6; shorten it" in refused.err
    succeed("quantize", "--random", "tiny", *made, "--prompts", file)
    shown = succeed("info", tmp_path / "q")
    assert "20 channels, at most 6 tokens" in shown.out
    scorer = Scorer()
    monkeypatch.setattr(TransformersClip, "load", lambda *_: scorer)
    out = tmp_path / "evaluation"
    words = ("--random", "tiny", "--prompts", file, "--count", 6, "--out", out)
    clip = ("--clip", tmp_path)
    ran = succeed("evaluate", tmp_path / "q", *words, *clip, "--export", "geneval", "--json")
    found = ran.document["metrics"]["clip"], ran.document["float_metrics"]["clip"]
    assert found == pytest.approx((100 / 3,) * 2) and scorer.asked == set(TEXTS)
    for kind in ("quantized", "float"):
        folders = sorted(path.name for path in (out / f"{kind}-geneval").iterdir())
        assert folders == ["00000", "00001", "00002", "prompts.json"]
        said = json.loads((out / f"{kind}-geneval" / "00001" / "metadata.jsonl").read_text())
        assert said == {"prompt": TEXTS[1]}
        pictures = sorted((out / f"{kind}-geneval" / "00001" / "samples").iterdir())
        assert [path.name for path in pictures] == ["0000.png", "0001.png"]
    assert "two dogs" in (out / "report.html").read_text()
    analyze_few(monkeypatch.setattr)
    few = ("--images", 1, "--widths", 4, "--out", tmp_path / "analysis")
    succeed("analyze", "--random", "tiny", "--prompts", file, *few)


@pytest.mark.slow
def test_layouts_take_names_from_the_records(tmp_path: Path) -> None:
    records = [{"id": f"p-{n}", "category": "art", "prompt": t} for n, t in enumerate(TEXTS)]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(records))
    words = ("evaluate", "--random", "tiny", "--prompts", path, "--encoder", tmp_path)
    words = (*words, "--metrics", "none")
    out = tmp_path / "out"
    ran = succeed(*words, "--count", 3, "--export", "mjhq", "--out", out)
    assert "float-mjhq/" in ran.out and not (out / "report.html").exists()
    assert len(list((out / "float-mjhq" / "art").glob("p-?.png"))) == 3
    succeed(*words, "--count", 6, "--export", "imagereward", "--out", out)
    lines = json.loads((out / "float-imagereward" / "metadata.jsonl").read_text())
    assert [line["id"] for line in lines] == ["p-0", "p-1", "p-2"]
    assert all(Path(image).is_file() for line in lines for image in line["gen_image_paths"])
    refused = run(*words, "--count", 4, "--export", "mjhq", "--out", tmp_path / "new")
    assert refused.code == 2 and "give --count 3 or fewer" in refused.err
    for wrong in ({"id": "../x"}, {"id": "p-0"}):
        path.write_text(json.dumps([records[0], {**records[1], **wrong}]))
        refused = run(*words, "--export", "geneval", "--out", tmp_path / "new")
        assert refused.code == 2 and "id" in refused.err


BAD = [
    ("generate --random tiny --classes cat --out {out}", "classes 'cat': model 'tiny' reads texts"),
    ("generate demo --prompt cat --out {out}", "prompt 'cat': model 'demo' reads no texts"),
    ("generate demo --classes cat --negative x --out {out}", "negative 'x'"),
    ("generate demo --classes cat --encoder x --out {out}", "encoder 'x'"),
    ("generate demo --classes cat --prompt x --out {out}", "give one of --classes"),
    ("generate demo --out {out}", "'--classes'"),
    ("generate --random tiny --prompt cat --cfg 1,2 --out {out}", "cfg: 2 values"),
    ("generate --random tiny --prompt cat --guide-at -9 --out {out}", "guide_at -9: expected 0"),
    ("generate --random tiny --prompt cat --guide-at x --out {out}", "'--guide-at'"),
    ("generate demo --classes cat --guide-at 0,-1 --out {out}", "guided in its logits only"),
    ("generate --random tiny --prompt cat --tau 0 --out {out}", "tau is 0"),
    ("generate --random tiny --prompt cat --tau x --out {out}", "'--tau'"),
    ("generate --random tiny --prompt cat --size 2M --out {out}", "size '2M': expected one of"),
    ("generate --random tiny --prompt cat --negative x --cfg 1 --out {out}", "with cfg 1.0 no"),
    ("generate demo --classes cat --size 1M --out {out}", "draws at one size only"),
    ("generate --random tiny --prompts {here}/gone.txt --out {out}", "gone.txt: cannot be read"),
    ("generate --random tiny --prompts {here}/empty.txt --out {out}", "line 2: empty"),
    ("generate --random tiny --prompts {here}/long.txt --out {out}", "10000 characters"),
    ("quantize --random tiny --prompts {here}/long.txt --out {out}", "10000 characters"),
    ("quantize demo --prompts {here}/one.txt --out {out}", "reads no texts; leave out --prompts"),
    ("evaluate demo --metrics none --out {out}", "metrics none: nothing would be written"),
    ("evaluate demo --prompts {here}/one.txt --out {out}", "one.txt': model 'demo' reads no texts"),
    ("analyze demo --prompts {here}/one.txt --out {out}", "reads no texts; leave out --prompts"),
    ("generate demo --prompts {here}/one.txt --out {out}", "name what to draw with --classes"),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=[line for line, _ in BAD])
def test_what_is_refused_in_one_line(line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("a cat\n\n")
    (tmp_path / "long.txt").write_text("x" * 10_000)
    (tmp_path / "one.txt").write_text("a cat\n")
    places = {"here": tmp_path, "out": tmp_path / "new"}
    ran = run(*(word.format(**places) for word in line.split()))
    assert ran.code == 2 and expected in ran.err, ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_what_does_not_fit_into_memory_goes_block_by_block(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow = dataclasses.replace(PRESET, transformer_arch=sized(depth=2))
    monkeypatch.setitem(PRESETS, "tiny", shallow)
    var, vae = write_random("tiny", tmp_path / "files")
    words = ("quantize", "--var", var, "--vae", vae, "--prompts", file, "--size", "0.06M")
    words = (*words, "--samples", 1, "--json", "--method")
    ran = {}
    for name, copies in (("whole", 1), ("streamed", 10**6)):
        monkeypatch.setattr("varptq.streamed.IN_MEMORY", copies)
        ran[name] = succeed(*words, "rtn", "--memory", "1GB", "--out", tmp_path / name)
        assert ("block by block" in ran[name].err) == (name == "streamed")
        assert not (tmp_path / f"{name}.work").exists()
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ran)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for key in ("sizes", "runs_on", "model"):
        assert ran["whole"].document[key] == ran["streamed"].document[key]
    for place in ("varptq.streamed", "varptq.models.memory"):
        monkeypatch.setattr(f"{place}.free_bytes", lambda _: 1000)
    refused = run(*words, "brecq", "--out", tmp_path / "refused")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "rtn and gptq" in refused.err
    assert not (tmp_path / "refused.work").exists()


GOLDEN = Path(__file__).parents[1] / "golden"
TEXT_FILES = [f"{GOLDEN}/data_infinity/weights/{n}_a.safetensors" for n in ("infinity", "vae")]
CLASS_FILES = [f"{GOLDEN}/data/weights/{n}.safetensors" for n in ("var_plain", "vae_tiny")]
OTHER_KIND = [
    ("generate var-d30 --prompt cat", "prompt 'cat': model 'var-d30' reads no texts"),
    ("generate infinity-8b --classes cat", "classes 'cat': model 'infinity-8b' reads texts"),
    ("generate --random tiny --classes cat", "classes 'cat': model 'tiny' reads texts"),
    (f"generate --var {TEXT_FILES[0]} --vae {TEXT_FILES[1]} --classes 3", "model 'infinity_a'"),
    (f"quantize --var {CLASS_FILES[0]} --vae {CLASS_FILES[1]} --prompts {{one}}", "'var_plain'"),
    (f"analyze --vae {CLASS_FILES[1]} --prompts {{one}}", "give the transformer as --var, too"),
    ("evaluate {artifact} --prompts {one}", "model 'demo' reads no texts; leave out --prompts\n"),
    ("generate {artifact} --negative x --classes 3", "leave out --negative, and name what"),
]


@pytest.mark.parametrize(("line", "expected"), OTHER_KIND, ids=[line for line, _ in OTHER_KIND])
def test_options_for_another_kind_of_model_are_refused_before_one_is_loaded(
    line: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelChoice, "load", loaded)
    monkeypatch.setattr(ModelChoice, "load_float", loaded)
    (tmp_path / "one.txt").write_text("a cat\n")
    (tmp_path / "artifact").mkdir()
    of_demo = SimpleNamespace(name="demo", architecture=SimpleNamespace(family="var"))
    reading = import_module("varptq.artifact.load")
    monkeypatch.setattr(reading, "read_config", lambda _: (of_demo, ""))
    places = {"one": tmp_path / "one.txt", "artifact": tmp_path / "artifact"}
    ran = run(*line.format(**places).split(), "--out", tmp_path / "new")
    assert ran.code == 2 and expected in ran.err, ran.err
