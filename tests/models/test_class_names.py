"""Names of classes: those of ImageNet, files of names, and what a word is taken for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import varptq
from varptq.errors import InputError
from varptq.models.class_names import imagenet_classes, place_of, title_of, words_of
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS

NAMES = (
    "golden eagle, Aquila",
    "golden dog, retriever",
    "Cardigan",
    "cardigan",
    "tank suit, crane",
)


@pytest.mark.slow
def test_every_word_of_imagenet_is_a_class_or_is_refused_with_those_it_could_be() -> None:
    entries = imagenet_classes()
    assert len(entries) == len({title_of(entry) for entry in entries}) == 1000
    shared = 0
    for place, entry in enumerate(entries):
        assert place_of(title_of(entry), entries) == place
        for word in words_of(entry):
            others = [i for i, other in enumerate(entries) if word in words_of(other)]
            titles = [i for i, other in enumerate(entries) if word == title_of(other)]
            if len(others) == 1 or titles:
                assert place_of(word, entries) == (titles or others)[0]
                continue
            shared += 1
            with pytest.raises(InputError) as caught:
                place_of(word, entries)
            assert all(f"({i})" in str(caught.value) for i in others)
    assert shared > 10


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("golden dog", 1),
        ("GOLDEN DOG", 1),
        ("Retriever", 1),
        ("golden d", 1),
        ("aq", 0),
        ("Cardigan", 2),
        ("cardigan", 3),
        ("crane", 4),
        ("cr", 4),
    ],
)
def test_what_a_word_is_taken_for(name: str, place: int) -> None:
    assert place_of(name, NAMES) == place


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("golden", r"class 'golden': could be 'golden eagle' \(0\), 'golden dog' \(1\); give one"),
        ("CARDIGAN", r"could be 'Cardigan' \(2\), 'cardigan' \(3\)"),
        ("retreiver", "class 'retreiver': unknown; did you mean golden dog"),
        ("zzz", "unknown; did you mean golden eagle, golden dog, Cardigan, cardigan, tank suit"),
        ("", "unknown"),
    ],
)
def test_a_word_that_means_no_class(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        place_of(name, NAMES)


def test_a_released_model_is_asked_by_name(make_tiny: Callable[..., Pipeline]) -> None:
    assert all(PRESETS[f"var-d{depth}"].class_names == imagenet_classes() for depth in (16, 36))
    pipe = make_tiny(num_classes=1000).named(imagenet_classes())
    prompts = pipe.prompts(["golden retriever", "tench", 3, "Tinca tinca", "labrador"])
    assert prompts.facts() == [207, 0, 3, 0, 208]
    assert prompts.titles()[:3] == ["golden retriever", "tench", "tiger shark"]
    assert varptq.read_class_names("imagenet") == imagenet_classes()
    assert prompts.captions()[0] == "a photo of a golden retriever"


def test_names_of_a_file_stay_in_the_artifact(tiny: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfoak, Quercus\r\nelm\r\nash\r\nfir\r\nyew\r\n")
    named = tiny.named(varptq.read_class_names(path))
    assert tiny.class_names != named.class_names
    config = varptq.QuantConfig.preset("w8a8")
    calibration = varptq.CalibrationConfig(num_samples=2)
    varptq.save(
        varptq.quantize(named, config, method="rtn", calibration=calibration), tmp_path / "q"
    )
    loaded = varptq.load(tmp_path / "q", runtime="simulated")
    assert loaded.prompts(["quercus", "yew"]).facts() == [0, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected a class name a line"),
        (b"oak\n\nash\n", "line 2 has no name"),
        (b", Quercus\n", "line 1 has no name"),
        (b"oak\n" + b"a" * 501, "line 2 has 501 characters, expected .* at most 500"),
        (b"oak\n17\n", "line 2 is '17', which means something else"),
        (b"unconditional\n", "line 1 is 'unconditional', which means something else"),
        (b"oak\nelm\noak, Quercus", "line 3 is 'oak', and so is 1"),
        (b"oak\n\xff\n", "byte 4 is not UTF-8; save the class names as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_list_of_names(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        varptq.read_class_names(path)


def test_names_that_do_not_fit_the_model(tiny: Pipeline) -> None:
    with pytest.raises(InputError, match="2 names, expected one for each of 5 classes"):
        tiny.named(["a", "b"])
    with pytest.raises(InputError, match="class_names: entry 2 is 'a', and so is 1"):
        tiny.named(["a", "a, b"])
    with pytest.raises(InputError, match="this model reads texts and has no classes"):
        varptq.load_model("demo-text").named(["a"])
