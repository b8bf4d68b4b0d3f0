"""What OpenAI's client gets: the pictures that `generate` and `edit` draw, alone or in a crowd."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai", reason="the API's client is openai: varptq[dev]")

import openai

from helpers.api_server import API, Running, files, pixels, png
from helpers.studio_pages import photo
from varptq.editing import edit
from varptq.models.generate import decoded, generate
from varptq.models.pipeline import Pipeline
from varptq.pictures import to_pixels
from varptq.reading import read_image

pytestmark = API

CROWD = 50


def drawn(pipe: Pipeline, name: str, count: int, seed: int) -> np.ndarray:
    output = generate(pipe, [name] * count, seed=seed)
    assert output.images is not None
    return to_pixels(output.images)


def test_images_are_those_of_generate(server: Running, on_integers: Pipeline) -> None:
    answer = server.client().images.generate(prompt="cat", n=3, extra_body={"seed": 5})
    expected = drawn(on_integers, "cat", 3, 5)
    found = [pixels(file) for file in files(answer)]
    assert np.array_equal(found, expected)
    height, width = expected.shape[1:3]
    assert answer.size == f"{width}x{height}" and answer.output_format == "png"
    tokens = 3 * on_integers.scales.num_tokens
    assert answer.usage is not None and answer.usage.output_tokens == tokens


def test_a_seed_that_nobody_chose_is_told(server: Running) -> None:
    client = server.client()
    first = client.images.generate(prompt="1")
    seed = first.to_dict()["seed"]
    again = client.images.generate(prompt="bee", extra_body={"seed": seed})
    other = client.images.generate(prompt="bee")
    assert files(again) == files(first) != files(other)


def test_models_are_listed_by_name(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "texts"]
    assert client.models.retrieve("texts").object == "model"
    with pytest.raises(openai.NotFoundError, match="models: tiny, texts"):
        client.models.retrieve("gpt-image-1")
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(prompt="cat", model="gpt-image-1")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_previews_come_before_the_image(server: Running, on_integers: Pipeline) -> None:
    client, seed = server.client(), {"seed": 7}
    stream = client.images.generate(prompt="dog", stream=True, partial_images=2, extra_body=seed)
    events = list(stream)
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    steps: list[np.ndarray] = []
    generate(
        on_integers,
        ["dog"],
        seed=7,
        on_scale=lambda step: steps.append(to_pixels(decoded(on_integers, step.f_hat))[0]),
    )
    assert np.array_equal([pixels(event.b64_json) for event in events[:2]], steps[:2])
    whole = client.images.generate(prompt="dog", extra_body=seed)
    assert files(whole) == [events[-1].b64_json]


def test_a_stream_has_every_image(server: Running) -> None:
    stream = server.client().images.generate(
        prompt="dog", stream=True, n=3, partial_images=1, extra_body={"seed": 7}
    )
    events = [event.to_dict() for event in stream]
    done = {e["image_index"]: e["b64_json"] for e in events if e["type"].endswith("completed")}
    whole = server.client().images.generate(prompt="dog", n=3, extra_body={"seed": 7})
    assert [done[index] for index in range(3)] == list(files(whole)) and len(events) == 6


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(server: Running, kind: Any) -> None:
    answer = server.client().images.generate(prompt="cat", output_format=kind)
    content = base64.b64decode(files(answer)[0])
    assert Image.open(io.BytesIO(content)).format == kind.upper()


@pytest.mark.slow
def test_a_crowd_gets_what_each_would_get_alone(server: Running) -> None:
    """Bit for bit, on integers, though they share batches; and the batches are shared."""
    wishes = [
        {"prompt": str(i % 5), "n": 1 + i % 3, "extra_body": {"seed": i}} for i in range(CROWD)
    ]
    alone = [files(server.client().images.generate(**wish)) for wish in wishes]
    before = [server.measured(f"batch_images_{what}") for what in ("sum", "count")]

    async def crowd() -> list[Any]:
        async with server.many() as client:
            return await asyncio.gather(*(client.images.generate(**wish) for wish in wishes))

    together = [files(answer) for answer in asyncio.run(crowd())]
    assert together == alone
    images, batches = (
        server.measured(f"batch_images_{what}") - old
        for what, old in zip(("sum", "count"), before, strict=True)
    )
    assert images == sum(wish["n"] for wish in wishes) > 2 * batches


def test_an_edit_is_that_of_edit(server: Running, on_integers: Pipeline) -> None:
    """Transparent pixels of the mask are drawn anew, as OpenAI has it, or white ones."""
    picture = read_image(photo((30, 24)))
    white = Image.new("L", picture.size)
    white.paste(255, (0, 0, 15, 24))
    clear = picture.convert("RGBA")
    clear.putalpha(white.point([255 - value for value in range(256)]))
    for to in ("cat", ""):
        task = "class" if to else "inpaint"
        wanted = edit(
            on_integers, picture, task=task, mask=white, to=to or None, seed=3, candidates=2
        )
        for mask in (white, clear):
            answer = server.client().images.edit(
                image=png(picture), mask=png(mask), prompt=to, n=2, extra_body={"seed": 3}
            )
            found = [pixels(file) for file in files(answer)]
            assert np.array_equal(found, [np.asarray(image) for image in wanted.images])
            assert answer.size == "30x24"


def test_an_edit_in_a_crowd_keeps_its_given_part(server: Running, on_integers: Pipeline) -> None:
    picture = read_image(photo((24, 24)))
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 12, 24))
    wanted = edit(on_integers, picture, task="class", mask=mask, to="eel", seed=1).images[0]

    async def crowd() -> list[Any]:
        async with server.many() as client:
            edits = (
                client.images.edit(
                    image=png(picture), mask=png(mask), prompt="eel", extra_body={"seed": 1}
                )
                for _ in range(3)
            )
            others = (client.images.generate(prompt="eel") for _ in range(9))
            return await asyncio.gather(*edits, *others)

    answers = asyncio.run(crowd())
    for answer in answers[:3]:
        assert np.array_equal(pixels(files(answer)[0]), np.asarray(wanted))


def test_an_edit_streams(server: Running) -> None:
    image = read_image(photo((24, 24))).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 12, 24))
    stream = server.client().images.edit(
        image=png(image), prompt="ant", stream=True, partial_images=1
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_model_that_reads_texts(server: Running) -> None:
    client = server.client()
    extra = {"seed": 2, "negative_prompt": "blue sky", "cfg": 2.0}
    answer = client.images.generate(model="texts", prompt="a red boat", n=2, extra_body=extra)
    other = client.images.generate(model="texts", prompt="a red boat", extra_body={"seed": 2})
    assert files(answer)[0] != files(other)[0]
    with pytest.raises(openai.BadRequestError, match=r"prompt: empty"):
        client.images.generate(model="texts", prompt=" ")
    unguided = {**extra, "cfg": 1}
    with pytest.raises(openai.BadRequestError, match="no scale is guided"):
        client.images.generate(model="texts", prompt="a red boat", extra_body=unguided)
