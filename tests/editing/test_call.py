"""`varptq.edit` on tiny models: what is kept is kept, what is drawn is drawn as it should be."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import varptq
from varptq.editing import read_image
from varptq.editing.edit import encode
from varptq.editing.frame import Frame
from varptq.errors import ConfigError, InputError, VarptqError
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import UNCONDITIONAL, ClassPrompts
from varptq.models.var.transformer import VAR
from varptq.pictures import write_png
from varptq.runtime.resolve import RUNTIMES

CENTRE = (0.3, 0.3, 0.7, 0.7)


def picture(width: int = 37, height: int = 30, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@pytest.fixture(scope="module")
def quantized(tiny: Pipeline) -> Pipeline:
    config = varptq.QuantConfig.preset("w4a4")
    calibration = varptq.CalibrationConfig(num_samples=2, steps=0)
    return varptq.quantize(tiny, config, method="rtn", calibration=calibration)


@pytest.fixture(scope="module")
def artifact(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edit") / "artifact"
    varptq.save(quantized, folder)
    return folder


@pytest.fixture(scope="module", params=["tiny", "tiny_shared", "quantized", *RUNTIMES])
def any_pipe(request: pytest.FixtureRequest) -> Pipeline:
    if request.param not in RUNTIMES:
        return request.getfixturevalue(request.param)
    try:
        return varptq.load(request.getfixturevalue("artifact"), runtime=request.param)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def conditions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The labels of every batch that the transformer is asked about."""
    seen: list[list[int]] = []
    original = VAR.condition

    def spy(self: VAR, prompts: ClassPrompts) -> Any:
        seen.append(prompts.labels_B.tolist())
        return original(self, prompts)

    monkeypatch.setattr(VAR, "condition", spy)
    yield seen


@pytest.mark.slow
@settings(max_examples=25)
@given(
    st.sampled_from([(1, 1), (1, 9), (3, 2), (6, 6), (37, 37), (130, 41), (41, 130)]),
    st.sampled_from(["crop", "pad"]),
    st.sampled_from([3, 4]),
    st.sampled_from([None, 0, 1, 7]),
    st.integers(0, 2**20),
)
def test_kept_pixels_are_kept(
    tiny: Pipeline, size: tuple[int, int], fit: str, channels: int, feather: Any, seed: int
) -> None:
    image = picture(*size, channels, seed)
    noise = np.random.default_rng(seed).random((size[1], size[0]))
    noise[-size[1] // 2 :, -size[0] // 2 :] += 1
    mask = Image.fromarray((noise > 0.97).astype(np.uint8) * 255)
    result = varptq.edit(
        tiny, image, task="class", to=1, mask=mask, fit=fit, feather=feather, seed=seed
    )
    found, weight = np.asarray(result.images[0]), np.asarray(result.mask_used)
    assert result.images[0].mode == image.mode and result.images[0].size == size
    assert (found[weight == 0] == np.asarray(image)[weight == 0]).all()
    # The weight is 0 beyond the feather: brute force over the distance to the mask.
    width = feather if feather is not None else max(size)
    white = np.argwhere(np.asarray(mask) > 0)
    for y, x in np.argwhere(weight > 0):
        assert np.abs(white - (y, x)).max(1).min() <= width


@pytest.mark.slow
@pytest.mark.parametrize("task", ["inpaint", "outpaint", "class"])
def test_every_pipeline_edits(any_pipe: Pipeline, task: str) -> None:
    label = "cat" if task == "class" else None
    result = varptq.edit(any_pipe, picture(), task=task, box=CENTRE, to=label, candidates=2)
    assert [image.size for image in result.images] == [(37, 30)] * 2
    assert result.mask_used.size == result.before.size == (37, 30)
    found, weight = np.asarray(result.images[0]), np.asarray(result.mask_used)
    assert (found[weight == 0] == np.asarray(picture())[weight == 0]).all()
    assert (found[weight == 255] != np.asarray(picture())[weight == 255]).any()
    given_L = encode(any_pipe, [Frame.of((37, 30), (6, 6), "crop").to_model(picture())])[0]
    assert (result.tokens[:, result.keep_L] == given_L[result.keep_L]).all()
    assert result.keep_L[0] and 0 < int((~result.keep_L).sum()) < any_pipe.scales.num_tokens


def test_drawn_tokens_are_those_of_generation(tiny: Pipeline) -> None:
    """The same call written out: encode, force, generate."""
    result = varptq.edit(tiny, picture(6, 6), box=CENTRE, raw=True, seed=5, candidates=2)
    given_L = encode(tiny, [picture(6, 6)])[0]
    # 3 x 3 tokens, round(0.3 * 3) = 1 and round(0.7 * 3) = 2: the middle one; the scales before
    # it see no more than a corner and keep theirs.
    forced = given_L.clone()
    forced[5 + 4] = -1
    expected = varptq.generate(
        tiny, [UNCONDITIONAL] * 2, cfg=0, forced=forced.expand(2, -1), seed=5
    )
    assert (result.tokens == expected.tokens).all()
    assert expected.images is not None
    pixels = np.asarray(result.images[1]).astype(float) / 255
    assert np.abs(pixels - expected.images[1].permute(1, 2, 0).numpy()).max() < 1 / 255


def test_in_and_out_painting_do_not_double_the_batch(
    tiny: Pipeline, conditions: list[list[int]]
) -> None:
    for task in ("inpaint", "outpaint"):
        varptq.edit(tiny, picture(), task=task, box=CENTRE, candidates=3)
    assert conditions == [[tiny.var.arch.num_classes] * 3] * 2


def test_a_class_is_guided(tiny: Pipeline, conditions: list[list[int]]) -> None:
    by_name = varptq.edit(tiny, picture(), task="class", box=CENTRE, to="dog", candidates=2)
    by_id = varptq.edit(tiny, picture(), task="class", box=CENTRE, to=3, candidates=2, cfg=1.5)
    assert by_name.cfg == 1.5
    assert (by_name.tokens == by_id.tokens).all()
    assert conditions == [[3, 3, 5, 5]] * 2
    varptq.edit(tiny, picture(), task="class", box=CENTRE, to="3", cfg=0)
    assert conditions[-1] == [3]


def test_a_class_in_painted_is_the_class_changed_to(tiny: Pipeline) -> None:
    painted, changed = (
        varptq.edit(tiny, picture(), task=task, box=CENTRE, to="dog")
        for task in ("inpaint", "class")
    )
    assert (painted.tokens == changed.tokens).all()
    assert (painted.asked, painted.sampling) == ("dog", changed.sampling)


def test_no_class_has_a_name_on_every_model(tiny: Pipeline) -> None:
    nameless = Pipeline(tiny.var, tiny.vae, "nameless")
    for pipe in (tiny, nameless):
        assert pipe.prompts([UNCONDITIONAL, 2]).facts() == [5, 2]
        assert pipe.prompts([UNCONDITIONAL]).titles() == [UNCONDITIONAL]
    titles = [pipe.prompts([2]).titles() for pipe in (tiny, nameless)]
    assert titles == [["cat"], ["class 2"]]
    with pytest.raises(InputError, match=r"class 5: not in 0\.\.4"):
        tiny.prompts([5])


def test_out_painting_keeps_what_in_painting_draws(tiny: Pipeline) -> None:
    inside = varptq.edit(tiny, picture(24, 24), box=(0, 0, 2 / 3, 1))
    outside = varptq.edit(tiny, picture(24, 24), box=(0, 0, 2 / 3, 1), task="outpaint")
    last = tiny.scales.slices()[-1]
    assert (inside.keep_L[last] == ~outside.keep_L[last]).all()


def test_candidates_have_noise_of_their_own(tiny: Pipeline) -> None:
    def wide(**more: Any) -> varptq.EditResult:
        return varptq.edit(tiny, picture(), mask=half(), seed=3, **more)

    many = wide(candidates=5, batch_size=2)
    assert len({tuple(row) for row in many.tokens.tolist()}) == 5
    for i in (0, 3):
        alone = wide(first_index=i)
        assert (alone.tokens[0] == many.tokens[i]).all()
        assert (np.asarray(alone.images[0]) == np.asarray(many.images[i])).mean() > 0.99
    assert (varptq.edit(tiny, picture(), mask=half(), seed=4).tokens[0] != many.tokens[0]).any()


def half(width: int = 37, height: int = 30) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_raw_is_the_models_picture(tiny: Pipeline) -> None:
    pasted = varptq.edit(tiny, picture(), mask=half(), feather=0)
    raw = varptq.edit(tiny, picture(), mask=half(), raw=True)
    side = tiny.vae.image_size[0]
    for image in (raw.images[0], raw.before, raw.mask_used):
        assert image.size == (side, side)
    assert (raw.tokens == pasted.tokens).all()
    assert raw.images[0].mode == "RGB" and raw.mask_used.mode == "L"
    # Pasting is the raw picture in the size of the crop.
    crop = np.asarray(raw.images[0].resize((30, 30), Image.Resampling.LANCZOS))
    assert (np.asarray(pasted.images[0])[:, 3:18] == crop[:, :15]).all()


def test_transparent_pixels_are_a_mask(tiny: Pipeline) -> None:
    image = picture()
    image.putalpha(half().point([255 - v for v in range(256)]))
    by_alpha = varptq.edit(tiny, image, feather=0)
    assert by_alpha.images[0].mode == "RGBA"
    assert by_alpha.images[0].getchannel("A").getextrema() == (0, 255)  # beyond the crop
    padded = varptq.edit(tiny, image, fit="pad")
    assert padded.images[0].getchannel("A").getextrema() == (255, 255)
    assert padded.mask_used.getpixel((0, 0)) == 255 and padded.mask_used.getpixel((36, 0)) == 0
    # What hides behind transparency has no influence.
    other = image.copy()
    other.paste((255, 0, 0, 0), (0, 0, 18, 30))
    assert (varptq.edit(tiny, other, fit="pad").tokens == padded.tokens).all()


def test_a_mask_is_for_the_upright_image(tiny: Pipeline, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    picture(30, 37).save(path, exif=exif)
    result = varptq.edit(tiny, path, mask=half())
    assert result.before.size == (37, 30)
    assert (np.asarray(result.before) == np.asarray(read_image(path))).all()


def test_bytes_paths_and_images_are_one(tiny: Pipeline, tmp_path: Path) -> None:
    for name, image in (("image.png", picture()), ("mask.png", half())):
        image.save(tmp_path / name)
    ways = [
        (tmp_path / "image.png", tmp_path / "mask.png"),
        (str(tmp_path / "image.png"), (tmp_path / "mask.png").read_bytes()),
        (picture(), half()),
    ]
    tokens = [varptq.edit(tiny, image, mask=mask).tokens for image, mask in ways]
    assert all((found == tokens[0]).all() for found in tokens)


def test_a_colour_profile_goes_along_and_exif_does_not(tiny: Pipeline, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "my house"
    for mode, expected in (("RGB", profile), ("CMYK", None)):
        path = tmp_path / f"{mode}.jpg"
        picture().convert(mode).save(path, icc_profile=profile, exif=exif)
        write_png(tmp_path / "edited.png", varptq.edit(tiny, path, box=CENTRE).images[0])
        with Image.open(tmp_path / "edited.png") as edited:
            assert edited.info.get("icc_profile") == expected
            assert not edited.getexif()


def test_one_pixel_can_change_its_class(tiny: Pipeline) -> None:
    dot, white = Image.new("RGB", (1, 1), (9, 9, 9)), Image.new("1", (1, 1), 1)
    result = varptq.edit(tiny, dot, task="class", to=0, mask=white)
    assert result.images[0].size == (1, 1)
    with pytest.raises(InputError, match="mask: full"):
        varptq.edit(tiny, dot, mask=white)


def test_progress_is_told_and_global_randomness_left_alone(tiny: Pipeline) -> None:
    calls: list[tuple[str, int, int]] = []
    torch.manual_seed(1)
    before = torch.get_rng_state()
    varptq.edit(
        tiny, picture(), box=CENTRE, candidates=3, batch_size=2,
        progress=lambda stage, done, total, info="": calls.append((stage, done, total)),
    )  # fmt: skip
    assert calls == [("generate", 0, 3), ("generate", 2, 3), ("generate", 3, 3)]
    assert (torch.get_rng_state() == before).all()


def black() -> Image.Image:
    return Image.new("L", (37, 30))


def outside_the_crop() -> Image.Image:
    mask = black()
    mask.paste(255, (0, 0, 3, 30))
    return mask


def tiny_prompts() -> ClassPrompts:
    return ClassPrompts.pool(5, ())[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "mask: none given; give a mask, a box, or an image with transparent pixels"),
        ({"mask": black()}, "mask: empty, so nothing would be regenerated"),
        (
            {"mask": Image.new("L", (37, 30), 255)},
            "mask: full, so no token of the 3 x 3 grid is",
        ),
        ({"mask": Image.new("L", (30, 37), 255)}, "mask: 30 x 37 pixels, the image has 37 x 30"),
        ({"mask": outside_the_crop()}, "mask: covers no token .* use fit pad"),
        ({"mask": b"nonsense"}, "mask: not a JPEG, PNG or WebP"),
        ({"mask": half(), "box": CENTRE}, "mask and box: both given"),
        ({"box": (0.4, 0.4, 0.48, 0.48)}, "box: covers no token"),
        ({"box": (0, 0, 0.001, 1)}, "box: empty, so nothing"),
        ({"box": (0, 0, 1, 1)}, "box: full"),
        ({"box": (0, 0, 1, 1), "task": "outpaint"}, "box: empty"),
        ({"box": (0.7, 0, 0.3, 1)}, "box 0.7,0,0.3,1: expected"),
        ({"box": CENTRE, "task": "upscale"}, "task 'upscale': unknown, expected one of inpaint"),
        ({"box": CENTRE, "task": "class"}, "task class: no class given"),
        ({"box": CENTRE, "task": "class", "to": "cta"}, "class 'cta': unknown; did you mean cat"),
        ({"box": CENTRE, "task": "class", "to": "DGO"}, "class 'DGO': .* you mean dog"),
        ({"box": CENTRE, "task": "class", "to": 9}, r"class 9: not in 0\.\.4"),
        ({"box": CENTRE, "to": tiny_prompts()}, "to: 2 prompts, expected one"),
        ({"box": CENTRE, "task": "prompt", "to": "cat"}, "task prompt: .* use task class"),
        ({"box": CENTRE, "negative": "cat"}, "negative: this model takes no negative prompts"),
        ({"box": CENTRE, "size": "1M"}, "size '1M': this model draws at one size only"),
        ({"box": CENTRE, "cfg": 2.0}, "cfg 2.0: inpaint towards nothing"),
        ({"box": CENTRE, "task": "class", "to": 1, "cfg": -1.0}, "cfg"),
        ({"box": CENTRE, "top_p": 2.0}, "top_p"),
        ({"box": CENTRE, "candidates": 0}, "candidates 0: must be at least 1"),
        ({"box": CENTRE, "batch_size": 0}, "batch_size 0"),
        ({"box": CENTRE, "feather": -1}, "feather -1: must be 0 pixels or more"),
        ({"box": CENTRE, "fit": "stretch"}, "fit 'stretch': unknown"),
    ],
)
def test_what_cannot_be_used_is_named(
    tiny: Pipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(VarptqError, match=message) as error:
        varptq.edit(tiny, picture(), **arguments)
    assert isinstance(error.value, InputError | ConfigError)
    assert "\n" not in str(error.value)


def test_a_fully_transparent_image_has_nothing_to_keep(tiny: Pipeline) -> None:
    with pytest.raises(InputError, match="alpha channel: full"):
        varptq.edit(tiny, Image.new("RGBA", (8, 8)))
    with pytest.raises(InputError, match="alpha channel: empty"):
        varptq.edit(tiny, Image.new("RGBA", (8, 8), (0, 0, 0, 255)))


def test_a_large_photo_is_edited_in_its_own_size(tiny: Pipeline) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1500), (90, 120, 40)).save(buffer, "JPEG")
    result = varptq.edit(tiny, buffer.getvalue(), box=CENTRE)
    assert result.images[0].size == (2000, 1500)
