"""The trainer of the text-to-image demo on tiny images: what it writes, going on after a stop, its
losses against definitions written out, and the captions it learns from."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import varptq
from varptq.evaluate.features import Features
from varptq.models.infinity.words import HashedWords
from varptq.models.texts import TextPrompts
from varptq.progress import silent

FILES = ("vae_demo_text.safetensors", "infinity_demo_text.safetensors", "prompts.txt")
SCHEDULE = {"steps": 3, "batch": 4, "learning_rate": 4e-3, "warmup": 1, "save_every": 2}
# The smallest that norms of 32 groups allow: 8 x 8 images, tokens of sides 1, 2 and 4.
TINY: dict[str, Any] = {
    "sides": [1, 2, 4],
    "bits": {"ch_mult": [1, 1], "num_res_blocks": 1, "code_dim": 6, "schedule": SCHEDULE},
    "infinity": {
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "ffn_width": 48,
        "text_channels": 16,
        "text_maxlen": 12,
        "pool_heads": 2,
        "schedule": SCHEDULE,
    },
}
# Sums of float32 in another order.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 9 training and 5 test images each, of a colour of their own with noise."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 5)):
        for colour, name in enumerate(("ant", "bee")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image = random.integers(0, 80, (8, 8, 3), dtype=np.uint8)
                image[..., colour] += 160
                Image.fromarray(image).save(folder / part / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def train(parts: dict[str, ModuleType]) -> Callable[..., int]:
    """The command within this process: its exit code."""

    def run(*words: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_text.py", *map(str, words), "--threads", "1"])
            return parts["train_text"].main()

    return run


@pytest.fixture(scope="module")
def trained(
    train: Callable[..., int], images: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert train("--data", images, "--recipe", recipe, "--out", out) == 0
    return out


def test_the_files_are_a_model_and_a_record(trained: Path, parts: dict[str, ModuleType]) -> None:
    pipe = varptq.load_model(var=trained / FILES[1], vae=trained / FILES[0])
    sides = parts["text_recipe"].TextRecipe.from_dict(TINY).scales
    pipe = pipe.sized(sides)
    assert (pipe.vae.image_size, pipe.alphabet.draws) == ((8, 8), 6)
    texts = (trained / FILES[2]).read_text().splitlines()
    prompts = TextPrompts.of(HashedWords(16, 12).features(texts[:3]), texts[:3])
    output = varptq.generate(pipe, prompts, seed=0)
    assert output.images is not None and output.images.shape == (3, 3, 8, 8)
    assert 5 <= len(set(texts)) == len(texts) <= 10
    record = json.loads((trained / "record.json").read_text())
    assert record["steps"] == {"bits": 3, "infinity": 3}
    assert [losses[-1][0] for losses in record["losses"].values()] == [3, 3]
    measures = record["measures"]
    assert measures["psnr"] > 3 and 0 <= measures["entropy_of_a_bit"] <= 1
    # A bit that is guessed costs log 2.
    assert measures["test_loss"] < 1.2 * math.log(2)


@pytest.mark.slow
def test_a_stopped_run_ends_in_the_same_weights(
    train: Callable[..., int],
    trained: Path,
    images: Path,
    recipe: Path,
    tmp_path: Path,
    parts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after the state of step 2, in the first stage and then in the second."""
    words = ("--data", images, "--recipe", recipe, "--out", tmp_path)
    for stage, module in (("bits", "bits_stage"), ("infinity", "text_stage")):
        with monkeypatch.context() as patch:
            patch.setattr(parts[module], "stage", _stopping(parts[module].stage))
            with pytest.raises(KeyboardInterrupt):
                train(*words)
        assert torch.load(tmp_path / f"{stage}.state.pt", weights_only=True)["step"] == 2
    assert train(*words) == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def _stopping(stage: Callable[..., Any]) -> Callable[..., Any]:
    """The stage, stopped in its third step."""

    def made(*arguments: Any) -> Any:
        found = stage(*arguments)
        usual = found.loss

        def loss(step: int) -> torch.Tensor:
            if step == 2:
                raise KeyboardInterrupt
            return usual(step)

        found.loss = loss
        return found

    return made


def test_without_training_the_files_are_those_of_the_states(
    train: Callable[..., int],
    images: Path,
    recipe: Path,
    tmp_path: Path,
    parts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("--data", images, "--recipe", recipe, "--out", tmp_path)
    monkeypatch.setattr(parts["text_stage"], "stage", _stopping(parts["text_stage"].stage))
    with pytest.raises(KeyboardInterrupt):
        train(*words)
    assert train(*words, "--as-it-is") == 0
    assert json.loads((tmp_path / "record.json").read_text())["steps"] == {"bits": 3, "infinity": 2}
    average = torch.load(tmp_path / "infinity.state.pt", weights_only=True)["average"]
    written = safetensors.torch.load_file(tmp_path / FILES[1])
    assert written.keys() == average.keys()
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in average.items())


def test_training_bits_are_those_of_encoding(parts: dict[str, ModuleType]) -> None:
    """The training pass sums the pyramid that `encode` and `accumulate` define."""
    recipe = parts["text_recipe"].TextRecipe.from_dict(TINY)
    vae = parts["bits_stage"].build(recipe, {}, torch.device("cpu"))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = vae.features(x)
    f_hat, commitment, entropy = parts["bits_stage"].quantized(vae.pyramid, features)
    expected = vae.pyramid.accumulate(vae.encode(x))
    close(f_hat, expected)
    close(commitment, (features - expected).square().mean())
    # The image's gradient passes f_hat as if it were the features.
    grad = torch.autograd.grad(f_hat.sum(), features, retain_graph=True)[0]
    assert (grad == 1).all()
    assert torch.autograd.grad(entropy, features)[0].isfinite().all()


def test_the_entropies_by_hand(parts: dict[str, ModuleType]) -> None:
    """One scale of one position, two images: every bit is sure; the first says the same of both."""
    recipe = parts["text_recipe"].TextRecipe.from_dict({**TINY, "sides": [1]})
    vae = parts["bits_stage"].build(recipe, {}, torch.device("cpu"))
    features = torch.full((2, 6, 1, 1), 30.0)
    features[1, 1:] = -30.0
    entropy = parts["bits_stage"].quantized(vae.pyramid, features)[2]
    assert float(entropy) == pytest.approx(-5 / 6 * math.log(2), abs=2e-3)


def test_a_start_gives_the_tensors_that_fit(parts: dict[str, ModuleType]) -> None:
    recipe = parts["text_recipe"].TextRecipe.from_dict(TINY)
    build, cpu = parts["bits_stage"].build, torch.device("cpu")
    fresh = build(recipe, {}, cpu).state_dict()
    start = {
        "encoder.conv_in.weight": torch.ones(fresh["encoder.conv_in.weight"].shape),
        "decoder.conv_in.weight": torch.ones(3),
        "quantize.embedding.weight": torch.ones(2, 2),
    }
    found = build(recipe, start, cpu).state_dict()
    assert (found["encoder.conv_in.weight"] == 1).all()
    others = fresh.keys() - {"encoder.conv_in.weight"}
    assert all(torch.equal(found[name], fresh[name]) for name in others)


def test_the_loss_bit_by_bit(parts: dict[str, ModuleType]) -> None:
    """Flipped bits are read, those that answer them are predicted."""
    stage = parts["text_stage"]
    recipe = parts["text_recipe"].TextRecipe.from_dict(TINY)
    cpu = torch.device("cpu")
    vae = parts["bits_stage"].build(recipe, {}, cpu).eval()
    infinity = stage.build(recipe, 6, {}, cpu).eval()
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 8, generator=draws) * 2 - 1
    flips = torch.rand(2, 21, 6, generator=draws) < 0.3
    prompts = TextPrompts.of(stage.encoder(recipe).features(["a red car", "a cat"]))
    with torch.no_grad():
        losses = stage.cross_entropy(infinity, vae, prompts, x, flips)
        bits = vae.pyramid.encode(vae.features(x), flips)
        read = torch.where(flips, 1 - bits, bits)
        log_p = infinity(prompts, vae.teacher_inputs(read)).unflatten(-1, (6, 2)).log_softmax(-1)
    for image, token, bit in ((0, 0, 0), (1, 3, 5), (1, 20, 2)):
        expected = -log_p[image, token, bit, bits[image, token, bit]]
        close(losses[image, token, bit], expected)


def test_tokens_weigh_by_the_side_of_their_map(parts: dict[str, ModuleType]) -> None:
    scales = parts["text_recipe"].TextRecipe.from_dict(TINY).scales
    weights = parts["text_stage"]._weights(scales, True).flatten()
    assert float(weights.mean()) == pytest.approx(1)
    assert (weights / weights[0]).tolist() == pytest.approx([1] + [1 / 2] * 4 + [1 / 4] * 16)
    assert (parts["text_stage"]._weights(scales, False) == 1).all()


def test_texts_are_dropped(parts: dict[str, ModuleType]) -> None:
    prompts = TextPrompts.of(HashedWords(8, 5).features(["a cat", "a red car"]))
    found = parts["text_stage"].without(prompts, torch.tensor([True, False]))
    assert found.rows[0].features_TD is None and found.rows[0].length == 2
    assert found.rows[1] is prompts.rows[1]


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((0.05, 0.1, 0.05), "black"),
        ((0.5, 0.5, 0.45), "grey"),
        ((0.95, 0.95, 0.9), "white"),
        ((0.9, 0.1, 0.1), "red"),
        ((0.9, 0.1, 0.15), "red"),
        ((0.4, 0.1, 0.1), "brown"),
        ((0.9, 0.5, 0.1), "orange"),
        ((0.5, 0.3, 0.1), "brown"),
        ((0.9, 0.9, 0.1), "yellow"),
        ((0.2, 0.7, 0.2), "green"),
        ((0.1, 0.8, 0.8), "turquoise"),
        ((0.1, 0.2, 0.9), "blue"),
        ((0.5, 0.1, 0.9), "purple"),
        ((0.9, 0.2, 0.7), "pink"),
    ],
)
def test_colours(parts: dict[str, ModuleType], rgb: tuple[float, ...], word: str) -> None:
    assert parts["captions"].color_of(rgb) == word


def test_what_pixels_say(parts: dict[str, ModuleType]) -> None:
    """A red middle on a blue ground, dark; black and white stripes, stark; one light grey."""
    pixels = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    pixels[0, 2] = 150
    pixels[0, :, 3:13, 3:13] = torch.tensor([150, 20, 20]).view(3, 1, 1)
    pixels[1, :, ::2] = 255
    pixels[2] = 170
    seen = parts["captions"].seen(pixels)
    assert (seen[0].color, seen[0].rim, seen[0].bright) == ("red", "blue", "dark")
    assert (seen[1].stark, seen[1].bright) == ("stark", "plain")
    assert vars(seen[2]) == {"bright": "bright", "stark": "flat", "color": "grey", "rim": "grey"}


def test_captions_are_functions_of_picture_label_seed_and_number(
    parts: dict[str, ModuleType],
) -> None:
    captions = parts["captions"]
    picture = captions.Seen("dark", "clear", "blue", "green")
    other = captions.Seen("bright", "flat", "orange", "white")
    texts = [captions.caption(picture, 1, 7, number) for number in range(200)]
    assert texts == [captions.caption(picture, 1, 7, number) for number in range(200)]
    assert texts != [captions.caption(picture, 1, 8, number) for number in range(200)]
    words = {word for text in texts for word in text.split()}
    assert {"dark", "clear", "blue", "green", "car", "automobile"} <= words
    assert not {"bright", "orange", "white"} & words
    # All of one number are equally long, whatever they show.
    for number in range(50):
        lengths = {
            len(captions.caption(one, label, 7, number).split())
            for one in (picture, other)
            for label in range(10)
        }
        assert len(lengths) == 1


def test_articles(parts: dict[str, ModuleType]) -> None:
    captions = parts["captions"]
    picture = captions.Seen("dark", "clear", "orange", "olive")
    text = captions.written("a {noun} on a {rim} background", picture, "airplane")
    assert text == "an airplane on an olive background"
    assert captions.written("a {color} {noun}", picture, "cat") == "an orange cat"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sides": [1, 2, 8]}, "8 x 8, expected 16 x 16"),
        ({"bits": {**TINY["bits"], "perceptual": 1}}, "--lpips go together"),
        ({"infinity": {**TINY["infinity"], "flips": 0.7}}, "flips is 0.7"),
    ],
    ids=["size", "perceptual", "flips"],
)
def test_mistakes_are_one_line(
    train: Callable[..., int],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: str,
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**TINY, **change}))
    assert train("--data", images, "--recipe", path, "--out", tmp_path / "out") == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ")
    assert expected in error and error.count("\n") == 1


class Halves:
    """A classifier that sees class 1 in every image."""

    name = "halves"

    def __call__(self, pixels_BHW3: torch.Tensor) -> Features:
        means = pixels_BHW3.double().mean((1, 2)).float()
        return Features(means, probabilities=torch.tensor([[0.1, 0.9]]).expand(len(means), 2))


def test_the_judge_asks_for_the_class_of_the_caption(
    trained: Path, images: Path, parts: dict[str, ModuleType], tmp_path: Path
) -> None:
    recipe = parts["text_recipe"].TextRecipe.from_dict(TINY)
    pipe = varptq.load_model(var=trained / FILES[1], vae=trained / FILES[0]).sized(recipe.scales)
    test = parts["data"].load(images, tmp_path / "images.npz", 8).test
    drawn = parts["text_judge"].judged(recipe, pipe, test, Halves(), 6, silent)
    assert drawn.measures["accuracy"] == 3 / 6 and drawn.measures["fd"] > 0
    assert drawn.pixels.shape == (6, 8, 8, 3) and len(drawn.texts) == 6
    assert {"airplane", "plane", "jet"} & set(drawn.texts[0].split())
