"""`varptq.edit` with a model that reads texts: prompts, their opposites, sizes, rectangles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import varptq
from helpers import infinity_states
from helpers.infinity_states import Words
from varptq.editing.edit import encode
from varptq.editing.frame import Frame
from varptq.errors import VarptqError
from varptq.models.infinity.schedules import TEMPLATES, schedule
from varptq.models.infinity.transformer import Infinity
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.texts import TextPrompts
from varptq.runtime.resolve import RUNTIMES

LEFT, CENTRE = (0, 0, 0.5, 1), (0.3, 0.3, 0.7, 0.7)
CAT, DOG = "a cat on a mat", "one dog"
MAPS = 4


def picture(width: int = 50, height: int = 30, seed: int = 0) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    waves = np.stack((rows * 5 % 200, columns * 3 % 200, (rows + columns) * 2 % 200), axis=-1)
    return Image.fromarray((waves + noise % 56).astype(np.uint8))


@pytest.fixture(scope="module")
def text() -> Pipeline:
    return infinity_states.pipeline(MAPS)


@pytest.fixture(scope="module")
def artifact(text: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibration = varptq.CalibrationConfig(num_samples=2, steps=0)
    config = varptq.QuantConfig.preset("w4a4")
    pipe = text.drawing_for([CAT, DOG])
    folder = tmp_path_factory.mktemp("edit") / "texts"
    varptq.save(varptq.quantize(pipe, config, method="rtn", calibration=calibration), folder)
    return folder


@pytest.fixture(scope="module", params=["float", *RUNTIMES])
def any_pipe(request: pytest.FixtureRequest) -> Pipeline:
    if request.param == "float":
        return request.getfixturevalue("text")
    try:
        pipe = varptq.load(request.getfixturevalue("artifact"), runtime=request.param)
    except VarptqError as error:
        pytest.skip(str(error))
    pipe.encoder = Words()
    return pipe


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The titles of every batch that the transformer is asked about."""
    seen: list[list[str]] = []
    original = Infinity.condition

    def spy(self: Infinity, prompts: TextPrompts) -> Any:
        seen.append(prompts.titles())
        return original(self, prompts)

    monkeypatch.setattr(Infinity, "condition", spy)
    yield seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "task"),
    [
        ((50, 30), {"task": "inpaint"}),
        ((24, 44), {"task": "outpaint", "to": CAT}),
        ((32, 32), {"task": "prompt", "to": CAT}),
    ],
)
def test_every_runtime_edits_in_the_pictures_proportions(
    any_pipe: Pipeline, size: tuple[int, int], task: dict[str, Any]
) -> None:
    image = picture(*size)
    result = varptq.edit(any_pipe, image, box=LEFT, candidates=2, feather=0, **task)
    found, weight = np.asarray(result.images[1]), np.asarray(result.mask_used)
    assert found.shape == (size[1], size[0], 3)
    assert (found[weight == 0] == np.asarray(image)[weight == 0]).all()
    assert (found[weight == 255] != np.asarray(image)[weight == 255]).any()
    pipe = any_pipe.over(any_pipe.var.shaped(size[1], size[0]))
    height, width = pipe.vae.image_size
    assert (height > width, height < width) == (size[1] > size[0], size[1] < size[0])
    seen = Frame.of(size, (height, width), "crop").to_model(image)
    given = encode(pipe, [seen])[0]
    assert result.tokens.shape == (2, pipe.scales.num_tokens, any_pipe.alphabet.draws)
    assert (result.tokens[:, result.keep_L] == given[result.keep_L]).all()
    assert (result.tokens[:, ~result.keep_L] != given[~result.keep_L]).any()


def test_an_edit_is_a_generation_with_tokens_given(text: Pipeline) -> None:
    """The same call written out, towards a text and away from another."""
    result = varptq.edit(
        text, picture(48, 48), box=CENTRE, task="prompt", to=CAT, negative=DOG, candidates=2, seed=5
    )
    side = text.vae.image_size
    given = encode(text, [Frame.of((48, 48), side, "crop").to_model(picture(48, 48))])
    forced = torch.where(result.keep_L[:, None], given, -1).expand(2, -1, -1)
    expected = varptq.generate(text, [CAT] * 2, negative=DOG, forced=forced, seed=5)
    assert (result.tokens == expected.tokens).all()
    assert result.asked == CAT and result.sampling == text.filled()
    # Centre of a 6 x 6 grid: round(0.3 * 6) to round(0.7 * 6); scales of three tokens are given.
    drawn = (~result.keep_L[text.scales.slices()[-1]]).reshape(6, 6)
    assert drawn[2:4, 2:4].all() and drawn.sum() == 4
    assert result.keep_L[0]


def test_what_is_asked_for_and_what_guidance_costs(text: Pipeline, asked: list[list[str]]) -> None:
    varptq.edit(text, picture(), box=LEFT)
    varptq.edit(text, picture(), box=LEFT, to=CAT)
    varptq.edit(text, picture(), box=LEFT, to=CAT, negative=DOG, cfg=(3.0,) * MAPS)
    varptq.edit(text, picture(), box=LEFT, negative=DOG)
    varptq.edit(text, picture(), box=LEFT, to=CAT, cfg=1)
    nothing = "unconditional"
    assert asked == [[nothing], [CAT, nothing], [CAT, DOG], [nothing, DOG], [CAT]]


def test_features_are_a_prompt(text: Pipeline) -> None:
    (features,) = Words().features([CAT])
    ways: list[Any] = [CAT, features, features.numpy(), text.prompts([CAT])]
    edited = [varptq.edit(text, picture(), box=LEFT, to=to).tokens for to in ways]
    assert all((tokens == edited[0]).all() for tokens in edited)
    other = varptq.edit(text, picture(), box=LEFT, to=DOG)
    assert (other.tokens != edited[0]).any()


def test_nothing_is_as_long_as_the_model_reads() -> None:
    short = infinity_states.pipeline(3, text_maxlen=2)
    assert short.var.unasked().facts() == [{"text": None, "tokens": 2}]
    varptq.edit(short, picture(), box=LEFT)


def test_a_size_is_what_the_model_sees(text: Pipeline) -> None:
    def drawn(**more: Any) -> varptq.EditResult:
        return varptq.edit(text, picture(), box=LEFT, raw=True, **more)

    own, tall = drawn(), drawn(size=schedule(3, 2.0))
    assert own.images[0].size == (28, 16)  # 30 / 50, and the template 0.571 is the nearest
    assert tall.images[0].size == (8, 16)
    assert tall.before.size == tall.mask_used.size == (8, 16)
    whole = drawn(size=text.scales, fit="pad")
    assert whole.images[0].size == (24, 24)


@pytest.mark.parametrize("ratio", list(TEMPLATES))
def test_the_nearest_shape_has_as_many_maps(text: Pipeline, ratio: float) -> None:
    height, width = TEMPLATES[ratio][-1]
    found = text.var.shaped(10 * height, 10 * width)
    assert found == Scales(TEMPLATES[ratio][:MAPS], TEMPLATES[ratio][-1])
    assert text.over(found).var.shaped(1, 1) == text.scales


def test_a_model_of_a_schedule_of_its_own_draws_at_that_one() -> None:
    own = Infinity(infinity_states.ARCH)
    assert own.shaped(1, 9) == own.scales and own.sizes() == ()
    assert own.over(schedule(7)).sizes()[:2] == ("0.06M", "0.25M")


def test_every_named_size_has_a_schedule(text: Pipeline) -> None:
    found = {name: text.var.schedule(name) for name in text.var.sizes()}
    assert len(set(found.values())) == len(found) == 4 * len(TEMPLATES)
    ratios = {scales.last[0] / scales.last[1] for scales in found.values()}
    assert min(ratios) < 0.35 and max(ratios) > 2.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"task": "class", "to": CAT},
            "task class: model 'tiny-text' reads texts; use task prompt",
        ),
        ({"task": "prompt"}, "task prompt: no prompt given; give a text"),
        ({"to": 3}, "prompt 0: a int, expected features"),
        ({"to": CAT, "negative": [CAT, DOG]}, "negative: 2 prompts, expected one for all"),
        (
            {"to": "one two three four five six seven eight nine"},
            "prompt 0: 10 tokens, expected at",
        ),
        ({"size": "2M"}, "model 'tiny-text': size '2M': expected one of 0.06M"),
        ({"cfg": 3.0}, "cfg 3.0: inpaint towards nothing"),
        ({"to": CAT, "cfg": (3.0, 3.0)}, "cfg: 2 values, expected one for all scales or 4"),
        ({"negative": DOG, "cfg": 1}, "negative: with cfg 1.0 no scale is guided"),
        ({"tau": 0.0}, "tau"),
    ],
)
def test_what_cannot_be_used_is_named(
    text: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(VarptqError, match=message) as error:
        varptq.edit(text, picture(), box=LEFT, **arguments)
    assert "\n" not in str(error.value)


def test_a_prompt_may_change_all_of_a_picture(text: Pipeline) -> None:
    whole = (0, 0, 1, 1)
    result = varptq.edit(text, picture(), task="prompt", to=CAT, box=whole)
    # Only the maps of at most three tokens are given.
    assert int(result.keep_L.sum()) == sum(n for n in schedule_of(text).lengths if n <= 3)
    with pytest.raises(VarptqError, match="box: full"):
        varptq.edit(text, picture(), to=CAT, box=whole)


def schedule_of(pipe: Pipeline) -> Scales:
    width, height = picture().size
    return pipe.var.shaped(height, width)
