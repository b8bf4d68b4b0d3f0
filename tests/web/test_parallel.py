"""Several people at once: everybody gets the pictures asked for, and one job runs at a time."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")

from PIL import Image

from helpers.studio_calls import Caller, drawing, editing, file_data
from helpers.studio_pages import STUDIO
from varptq.editing import edit
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline, load_model
from varptq.pictures import to_pixels
from varptq.runtime import load

pytestmark = STUDIO

PEOPLE = 8
PATIENCE = 60.0
SMALL, MADE = "models/small/var.safetensors", "models/w4a4"
SETTINGS = {"cfg": 4.0, "top_k": 10, "top_p": 0.9}
BOX = (0.0, 0.0, 0.5, 0.5)


@pytest.fixture(scope="module")
def pipes(served: Any) -> dict[str, Pipeline]:
    small = served.models / "small"
    return {
        SMALL: load_model(var=small / "var.safetensors", vae=small / "vae.safetensors"),
        MADE: load(served.models / "w4a4"),
    }


def last_pictures(caller: Caller, outputs: list[Any], name: str) -> list[np.ndarray]:
    """The files of that name that the page was given, without repeats, in order."""
    paths = re.findall(rf'"(/[^"]*/{name})"', json.dumps(outputs))
    files = [caller.file(path) for path in dict.fromkeys(paths)]
    assert all(file.status_code == 200 for file in files)
    return [np.asarray(Image.open(io.BytesIO(file.content))) for file in files]


def drawn(address: str, person: int) -> tuple[list[np.ndarray], str | None]:
    """What the page of this person shows in the end; every other one draws with the artifact."""
    caller = Caller(address)
    model, label = (SMALL, MADE)[person % 2], str(person % 5)
    wish = drawing(label, 1, person, *SETTINGS.values())
    answer = caller.call("generate", model, "nothing", *wish)
    name = rf"[^/\"]+-seed{person}-0\.png"
    return last_pictures(caller, answer.outputs, name), answer.error


@pytest.mark.slow
def test_pages_draw_at_once_and_none_gets_the_picture_of_another(
    served: Any, pipes: dict[str, Pipeline]
) -> None:
    with ThreadPoolExecutor(PEOPLE) as people:
        found = list(people.map(lambda person: drawn(served.address, person), range(PEOPLE)))
    for person, (pictures, error) in enumerate(found):
        assert error is None, (person, error)
        pipe = pipes[(SMALL, MADE)[person % 2]]
        output = generate(pipe, [person % 5], seed=person, **SETTINGS)
        assert output.images is not None
        np.testing.assert_array_equal(pictures[-1], to_pixels(output.images)[0], f"{person}")


def test_edits_at_once_are_not_mixed_up(served: Any, pipes: dict[str, Pipeline]) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (4, 37, 41, 3), dtype=np.uint8)

    def edited(person: int) -> list[np.ndarray]:
        caller = Caller(served.address)
        buffer = io.BytesIO()
        Image.fromarray(noise[person]).save(buffer, "PNG")
        image = file_data(caller.upload("photo.png", buffer.getvalue()))
        rest = editing("In-paint", "", 1, person, 4.0, "crop", True, *BOX)
        answer = caller.call("edit", MADE, image, None, *rest)
        assert answer.ok, answer.error
        return last_pictures(caller, answer.outputs, rf"edit-seed{person}-0\.png")

    with ThreadPoolExecutor(len(noise)) as people:
        found = list(people.map(edited, range(len(noise))))
    for person, pictures in enumerate(found):
        expected = edit(pipes[MADE], Image.fromarray(noise[person]), box=BOX, seed=person)
        np.testing.assert_array_equal(pictures[0], np.asarray(expected.images[0]))


@pytest.mark.slow
def test_those_who_wait_see_how_many_are_ahead(served: Any) -> None:
    settings = ("w4a4", "brecq", "default", 2, 15, 0)
    first, second = Caller(served.address), Caller(served.address)
    with ThreadPoolExecutor(2) as people:
        making = people.submit(first.call, "quantize", SMALL, *settings, "queued-1", False)
        also = people.submit(second.call, "quantize", SMALL, *settings, "queued-2", False)
        answers = making.result(), also.result()
    assert all(answer.ok for answer in answers), answers
    shown = [json.dumps(answer.outputs) for answer in answers]
    assert sum("Waiting, 1 job ahead" in text for text in shown) == 1
    for name in ("queued-1", "queued-2"):
        assert (served.out / name / "model.safetensors").is_file()


def test_a_page_that_is_closed_leaves_the_queue(served: Any) -> None:
    settings = (SMALL, "w4a4", "brecq", "default", 2, 20_000, 0, "long", False)
    owner, guest, watcher = (Caller(served.address) for _ in range(3))
    long = owner.listen("quantize", *settings)
    until(lambda: "reconstruct" in json.dumps(next(long)))
    waiting = guest.listen("generate", SMALL, "nothing", *drawing("0", 1, 0, *SETTINGS.values()))
    until(lambda: "Waiting, 1 job ahead" in json.dumps(next(waiting)))
    until(lambda: "1 of 0, waiting" in queue(watcher))
    waiting.close()
    until(lambda: "waiting" not in queue(watcher))
    # A calibration outlives its page, and another page may stop it.
    long.close()
    resumed = watcher.listen("resume")
    until(lambda: "reconstruct" in json.dumps(next(resumed)))
    resumed.close()
    stopper = Caller(served.address)
    again = stopper.listen("resume")
    until(lambda: "reconstruct" in json.dumps(next(again)))
    other_line = Caller(served.address)
    other_line.session = stopper.session
    body = {"data": [None], "fn_index": stopper.events["stop_2"], "session_hash": stopper.session}
    other_line.http.post(f"{stopper.api}/run/predict", json=body)
    until(lambda: "Stopped" in json.dumps(next(again)))
    assert not (served.out / "long").exists()


def queue(caller: Caller) -> str:
    return json.dumps(caller.call("queue").outputs)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
