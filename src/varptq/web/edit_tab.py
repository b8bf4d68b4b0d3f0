"""The tab Edit: paint what is to change, see candidates, compare with the original.

The server keeps the upload; the canvas gets a copy of a convenient size and sends back only
strokes. So the part that is kept has the upload's own pixels.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from gradio.components.image_editor import EditorValue
from PIL import Image, ImageChops

from varptq.editing import EditResult, edit
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import SamplingSettings
from varptq.pictures import VISIBLE_SIDE
from varptq.web import parts
from varptq.web.asking import Asking, Sampling, Wish, settings
from varptq.web.catalogue import Entry
from varptq.web.files import offer_picture, only_layers, painted, picture, stem
from varptq.web.jobs import Job
from varptq.web.runbar import RunBar, Updates
from varptq.web.studio import (
    MAX_SEED,
    MODELS,
    Studio,
    checked_here,
    refilled,
    says,
    toasts,
    whole,
)

MAX_CANDIDATES, AT_A_TIME = 8, 4
# Longer sides are shown smaller for painting, shorter ones larger.
CANVAS = (512, 768)
UPLOAD = "Upload an image."
# Name of candidates of nothing.
EDIT = "edit"
CHANGE = "change"
TASKS = {
    "In-paint": ("inpaint", "Paint what is to be drawn anew."),
    "Out-paint": ("outpaint", "Paint what is to be kept; everything around it is drawn anew."),
    "Change": (CHANGE, "Paint what is to become the class or the text given below."),
}


@dataclass(frozen=True)
class Request:
    """Arguments of `edit`, checked as far as possible without a model. The guidance of `settings`
    is for where something is asked for."""

    image: Image.Image
    task: str
    wish: Wish
    settings: SamplingSettings
    arguments: dict[str, Any]

    def towards(self, pipe: Pipeline) -> dict[str, Any]:
        """The arguments that depend on the kind of the model."""
        texts = pipe.var.READS_TEXTS
        task = self.task
        if task == CHANGE:
            task = "prompt" if texts else "class"
        # A class is shown, and may be left over, where the task has none.
        to = self.wish.to(pipe) if texts or self.task == CHANGE else ""
        found = {"to": to or None, "negative": self.wish.against(pipe)}
        asks = any(value is not None for value in found.values())
        drawn = {name: getattr(self.settings, name) for name in ("cfg", "tau", "top_k", "top_p")}
        if not asks:
            drawn["cfg"] = None
        return {"task": task, **found, **drawn, "size": self.wish.size_of(pipe)}


def request(
    path: str | None,
    editor: EditorValue | None,
    task: object,
    wish: Wish,
    candidates: object,
    seed: object,
    sampling: SamplingSettings,
    fit: object,
    use_box: bool,
    *box: float,
) -> Request:
    """From what a page sent. Raises `InputError` or `ConfigError`."""
    if task not in TASKS:
        raise InputError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    kind, hint = TASKS[str(task)]
    image = picture(path)
    where: dict[str, Any] = {"box": box}
    if not use_box:
        mask = painted(editor, image.size)
        if mask is None:
            raise InputError(f"mask: empty. {hint}")
        where = {"mask": ImageChops.invert(mask) if kind == "outpaint" else mask}
    count = whole("candidates", candidates, 1, MAX_CANDIDATES)
    arguments = {
        "fit": fit,
        "candidates": count,
        "seed": whole("seed", seed, 0, MAX_SEED),
        **where,
    }
    return Request(image, kind, wish, sampling, arguments)


@dataclass(frozen=True)
class Edited:
    """A result, whose candidates are saved as `stem`-0.png and so on."""

    result: EditResult
    stem: str


def compute(studio: Studio, entry: Entry, asked: Request, job: Job) -> None:
    """Emit an `Edited`."""
    pipe = studio.models.get(entry)
    arguments = {**asked.towards(pipe), **asked.arguments}
    result = edit(pipe, asked.image, batch_size=AT_A_TIME, progress=job.progress, **arguments)
    job.emit(Edited(result, stem(result.asked or EDIT, result.seed)))


def on_canvas(image: Image.Image) -> Image.Image:
    """`image` as an editor shows it; small images are enlarged without smoothing."""
    longest = max(image.size)
    goal = min(max(longest, CANVAS[0]), CANVAS[1])
    size = tuple(max(1, round(side * goal / longest)) for side in image.size)
    small = longest < VISIBLE_SIDE
    way = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.resize((size[0], size[1]), way)


class EditTab:
    """Builds the tab where it is made, with its events."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(elem_classes="tab"):
            with gr.Column(scale=1, min_width=300, elem_classes="controls"):
                inputs = self._controls()
            with gr.Column(scale=2, min_width=300):
                self._canvas()
                # Under the canvas: on a phone, painting is the last step before it.
                self.bar = RunBar(studio, "Edit", "edit")
                self._results()
        self._events([self.upload, self.editor, *inputs])

    def _controls(self) -> list[Any]:
        keys = self.studio.keys(*MODELS)
        known = self.studio.about(keys[0])
        self.model = checked_here(gr.Dropdown(keys, label="Model", elem_id="edit-model"))
        self.about = gr.HTML(says(keys[0], known), elem_id="edit-about")
        self.upload = gr.File(
            label="Image (JPEG, PNG, WebP)",
            file_types=[".jpg", ".jpeg", ".png", ".webp"],
            height=120,
            elem_id="edit-upload",
        )
        self.task = gr.Radio(list(TASKS), value="In-paint", label="Task", elem_id="edit-task")
        self.asking = Asking("edit", known, classes=False, own="Like the picture")
        with gr.Row():
            candidates = gr.Slider(
                1, MAX_CANDIDATES, value=4, step=1, label="Candidates", min_width=120
            )
            seed = gr.Number(0, precision=0, label="Seed", min_width=120)
        fit = gr.Radio(
            [("Centre", "crop"), ("Whole image", "pad")],
            value="crop",
            label="What the model sees",
        )
        with gr.Accordion("Sampling", open=False):
            self.sampling = Sampling(known, guided=known.texts)
        with gr.Accordion("A box instead of painting", open=False):
            use_box = gr.Checkbox(label="Use the box")
            sides = (("Left", 0.25), ("Top", 0.25), ("Right", 0.75), ("Bottom", 0.75))
            box = [gr.Slider(0, 1, value=value, step=0.01, label=name) for name, value in sides]
        drawn_by = [candidates, seed, *self.sampling.inputs]
        return [self.task, *self.asking.inputs, *drawn_by, fit, use_box, *box]

    def _canvas(self) -> None:
        self.hint = gr.HTML(parts.note(f"{UPLOAD} {TASKS['In-paint'][1]}"))
        self.editor = gr.ImageEditor(
            type="pil",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=48, colors=["#e0702ad0"], color_mode="fixed"),
            eraser=gr.Eraser(default_size=48),
            height=560,
            buttons=[],
            label="Picture",
            placeholder="# Upload an image first",
            elem_id="edit-canvas",
        )
        only_layers(self.editor)

    def _results(self) -> None:
        # Shown and hidden as a whole: if a component's own settings change, the app makes it anew,
        # without the limits of files.py.
        with gr.Column(visible=False) as self.outcome:
            self.results = gr.Gallery(
                label="Candidates",
                format="png",
                object_fit="contain",
                show_label=False,
                allow_preview=False,
                type="filepath",
                interactive=False,
                buttons=[],
                elem_id="edit-candidates",
            )
            self.slider = gr.ImageSlider(
                label="Before and after",
                format="png",
                type="filepath",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="edit-slider",
            )
            # Shown together with its file: a button that is already visible may miss the file that
            # arrives with its column, and then does nothing.
            self.download = gr.DownloadButton(
                "Download this candidate", visible=False, elem_id="edit-download"
            )

    def _events(self, inputs: list[Any]) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        results = [self.outcome, self.results, self.slider, self.download]
        self.bar.start.click(
            self.run,
            [self.model, *inputs],
            [*self.bar.outputs, *results],
            api_name="edit",
            concurrency_limit=None,
            show_progress="hidden",
        )
        self.upload.upload(
            self.show_upload, self.upload, [self.editor, self.outcome, self.download], **private
        )
        self.upload.clear(lambda: None, None, self.editor, **private)
        chosen = [self.model, self.task]
        shown = [self.hint, self.asking.name, self.sampling.cfg]
        self.task.change(self.explain, chosen, shown, **private)
        self.model.change(
            self.follow,
            [*chosen, self.sampling.last],
            [self.about, self.hint, *self.sampling.outputs, *self.asking.outputs],
            **private,
        )
        self.results.select(
            self.choose, [self.results, self.slider], [self.slider, self.download], **private
        )

    def pickers(self, model: str | None) -> Updates:
        """The picker with the present models; a choice that still exists stays."""
        keys = self.studio.keys(*MODELS)
        return {self.model: refilled(keys, model, keys[0])}

    def follow(self, model: str, task: str, last: Any) -> Updates:
        """The controls that the chosen model wants; the sliders start from its own settings."""
        with toasts():
            known = self.studio.about(model)
        own, shown = self.sampling.updates(last, known), self.explain(model, task)
        if self.sampling.cfg in own:
            shown[self.sampling.cfg]["value"] = own[self.sampling.cfg]
        asking = self.asking.updates([known])
        shown[self.asking.name] = {**asking[self.asking.name], **shown[self.asking.name]}
        return {self.about: says(model, known), **own, **asking, **shown}

    def show_upload(self, path: str | None) -> Updates:
        with toasts():
            canvas = offer_picture(self.editor, on_canvas(picture(path)), "canvas.png")
        hidden = gr.update(visible=False)
        shown = {"background": canvas, "layers": [], "composite": None}
        return {self.editor: shown, self.outcome: hidden, self.download: hidden}

    def explain(self, model: str, task: str) -> Updates:
        """The hint of a task; a class is asked for where something is to change, a text always."""
        with toasts():
            texts = self.studio.about(model).texts
        kind, hint = TASKS.get(task, TASKS["In-paint"])
        return {
            self.hint: parts.note(f"{UPLOAD} {hint}"),
            self.asking.name: gr.update(visible=kind == CHANGE and not texts),
            self.sampling.cfg: gr.update(visible=kind == CHANGE or texts),
        }

    def choose(
        self, results: list[Any] | None, pair: tuple[str, str] | None, event: gr.SelectData
    ) -> Updates:
        """Put the clicked candidate beside the original."""
        if not results or not pair or not isinstance(event.index, int):
            return gr.skip()
        chosen = results[min(event.index, len(results) - 1)][0]
        return {self.slider: (pair[0], chosen), self.download: chosen}

    async def run(
        self, model: str, path: str | None, editor: EditorValue | None, *rest: Any
    ) -> AsyncIterator[Updates]:
        """Queue the edit, and follow it."""
        with toasts():
            entry = self.studio.model(model)
            candidates, seed, *sampling = rest[5:11]
            wish, drawn_by = Wish.of(*rest[1:5]), settings(*sampling)
            asked = request(path, editor, rest[0], wish, candidates, seed, drawn_by, *rest[11:])
            title = f"{rest[0]}, {asked.arguments['candidates']} candidates"
            work = partial(compute, self.studio, entry, asked)
            job = self.studio.jobs.submit(entry.key, title, work)
            async for updates in self.bar.follow(job, self._show):
                yield updates

    def _show(self, edited: Edited) -> Updates:
        result = edited.result
        before = offer_picture(self.slider, result.before, "before.png")
        images = [
            offer_picture(self.results, image, f"{edited.stem}-{result.first_index + i}.png")
            for i, image in enumerate(result.images)
        ]
        style = ["pixels"] if max(result.before.size) < VISIBLE_SIDE else []
        return {
            self.outcome: gr.update(visible=True, elem_classes=style),
            self.results: images,
            self.slider: (before, images[0]),
            self.download: gr.update(value=images[0], visible=True),
        }
