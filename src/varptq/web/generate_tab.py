"""The tab Generate: images of a class or a text from one model, or from two beside each other.

Image i of both models draws from (seed, i), so the columns are comparable. While a model runs, its
column shows every scale, coarse to fine; the time for decoding these is not counted.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from varptq import readable
from varptq.artifact.sizes import quantized_size, transformer_size
from varptq.models.generate import ScaleEvent, decoded, generate
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import SamplingSettings
from varptq.pictures import VISIBLE_SIDE, Pixels, to_pixels
from varptq.web import parts
from varptq.web.asking import Asking, Sampling, Wish, settings
from varptq.web.catalogue import Entry, Kind
from varptq.web.files import offer_picture, stem
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

MAX_COUNT = 16
NOTHING = "nothing"
HINT = "Say what to draw and generate. Two models draw side by side, from the same seeds."
MISSING = "There is no quantized model yet. Make one in the tab Quantize, or in a shell: "


@dataclass(frozen=True)
class Request:
    """What to draw, the same for both models. own: what the sliders of `settings` started from; a
    model whose own settings are others draws by those."""

    wish: Wish
    count: int
    seed: int
    settings: SamplingSettings
    own: SamplingSettings

    @classmethod
    def checked(
        cls, wish: Wish, count: object, seed: object, own: dict[str, Any], *sampling: Any
    ) -> Request:
        """From what a page sent. Raises `InputError` or `ConfigError`."""
        return cls(
            wish,
            whole("images", count, 1, MAX_COUNT),
            whole("seed", seed, 0, MAX_SEED),
            settings(*sampling),
            SamplingSettings.from_dict(own),
        )

    def settings_of(self, pipe: Pipeline) -> SamplingSettings:
        return self.settings if pipe.filled() == self.own else pipe.filled()


@dataclass(frozen=True)
class Drawing:
    """Images (B, H, W, 3) uint8 after scale `scale` of `num_scales`, to be saved as `stem`-0.png
    and so on; `facts` at the end only."""

    images: Pixels
    stem: str
    scale: int
    num_scales: int
    facts: tuple[tuple[str, str], ...] = ()


def draw(studio: Studio, entry: Entry, request: Request, job: Job) -> None:
    """Emit a `Drawing` per scale and one with the facts."""
    pipe = request.wish.sized(studio.models.get(entry))
    shown = 0.0
    asked = request.wish.prompts(pipe, request.count)
    name = stem(asked.titles()[0], request.seed)

    def on_scale(event: ScaleEvent) -> None:
        nonlocal shown
        job.progress("drawing", event.scale + 1, pipe.scales.num_scales)
        started = time.monotonic()
        images = to_pixels(decoded(pipe, event.f_hat))
        job.emit(Drawing(images, name, event.scale, pipe.scales.num_scales))
        shown += time.monotonic() - started

    sampling = request.settings_of(pipe).to_dict()
    started = time.monotonic()
    output = generate(
        pipe,
        asked,
        seed=request.seed,
        batch_size=MAX_COUNT,
        on_scale=on_scale,
        **sampling,
    )
    spent = time.monotonic() - started - shown
    assert output.images is not None
    last = pipe.scales.num_scales
    facts = facts_of(pipe, request.count, spent)
    job.emit(Drawing(to_pixels(output.images), name, last, last, facts))


def facts_of(pipe: Pipeline, count: int, spent: float) -> tuple[tuple[str, str], ...]:
    """Time, memory and bits of a model, for people."""
    transformer = transformer_size(pipe)
    packed = quantized_size(pipe).bits_per_element
    config = getattr(pipe, "config", None)
    memory = f"transformer {readable.megabytes(transformer.bytes)}"
    if config is not None:
        memory += f" of {readable.megabytes(transformer.float32_bytes)} in float32"
        bits = f"{config.name}; {packed:.2f} per quantized weight, with scales"
    else:
        bits = f"{8 * pipe.dtype.itemsize}, float"
    runtime = getattr(pipe, "runtime", "float")
    rows = [
        ("Time", f"{spent:.2f} s, {spent / count:.2f} s an image, runtime {runtime}"),
        ("Memory", memory),
        ("Bits", bits),
    ]
    if pipe.device.type == "cuda":
        rows.append(("GPU peak", readable.megabytes(torch.cuda.max_memory_allocated(pipe.device))))
    return tuple(rows)


class Panel:
    """A column of results: title, images, their scales and the facts."""

    def __init__(self, name: str) -> None:
        with gr.Column(elem_classes="panel", min_width=260, visible=False) as self.column:
            self.title = gr.HTML()
            self.images = gr.Gallery(
                label="Images",
                format="png",
                object_fit="contain",
                show_label=False,
                buttons=["download", "fullscreen"],
                elem_id=f"generate-{name}",
                interactive=False,
            )
            # Hidden until there is an image: see `EditTab._results`.
            self.download = gr.DownloadButton(
                "Download",
                size="md",
                visible=False,
                elem_id=f"generate-{name}-download",
                elem_classes="download",
            )
            self.files = gr.State([])
            self.scales = gr.HTML(elem_id=f"generate-{name}-scales")
            self.facts = gr.HTML(elem_id=f"generate-{name}-facts")
        self.images.select(
            self.choose,
            self.files,
            self.download,
            api_visibility="private",
            show_progress="hidden",
        )

    @property
    def outputs(self) -> list[Any]:
        shown = [self.column, self.title, self.images, self.scales, self.facts]
        return [*shown, self.download, self.files]

    def clear(self, entry: Entry | None) -> Updates:
        """Empty, with the name of the model that is about to draw; hidden without one."""
        tone = "" if entry is None else "float" if entry.kind is Kind.float else "quantized"
        title = parts.heading(entry.key if entry else "", tone)
        shown = gr.update(visible=entry is not None)
        empty = {self.images: [], self.scales: "", self.facts: "", self.files: []}
        hidden = {self.download: gr.update(visible=False)}
        return {self.column: shown, self.title: title, **empty, **hidden}

    def show(self, steps: list[Pixels], drawing: Drawing) -> Updates:
        """The updates for a part of the result; `steps` collects the scales of one run."""
        small = max(drawing.images.shape[1:3]) < VISIBLE_SIDE
        style = ["pixels"] if small else []
        files = [
            offer_picture(self.images, Image.fromarray(image), f"{drawing.stem}-{i}.png")
            for i, image in enumerate(drawing.images)
        ]
        updates: Updates = {self.images: gr.update(value=files, elem_classes=style)}
        if drawing.facts:
            updates[self.facts] = parts.facts(drawing.facts)
            updates |= {self.files: files, self.download: self._offered(files[0])}
        else:
            steps.append(drawing.images[0])
            updates[self.scales] = parts.strip(steps, "First image, coarse to fine")
        return updates

    def choose(self, files: list[str], event: gr.SelectData) -> Any:
        """Offer the clicked image, unless images are still being drawn."""
        if not files or not isinstance(event.index, int):
            return gr.skip()
        return self._offered(files[min(event.index, len(files) - 1)])

    def _offered(self, file: str) -> Any:
        return gr.update(value=file, label=f"Download {Path(file).name}", visible=True)


def example(out: Path) -> str:
    """The command that puts a quantized model into the folder of the studio."""
    folder, here = out / "demo-w4a4", Path.cwd()
    if folder.is_relative_to(here):
        folder = folder.relative_to(here)
    words = ["varptq", "quantize", "demo", "--config", "w4a4", "--effort", "fast"]
    return shlex.join([*words, "--out", str(folder)])


def chosen_of(model: str, beside: str | None) -> list[str]:
    return [model] if beside in (None, "", NOTHING) else [model, beside]


class GenerateTab:
    """Builds the tab where it is made, with its events."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.example = example(studio.out)
        with gr.Row(elem_classes="tab"):
            with gr.Column(scale=1, min_width=300, elem_classes="controls"):
                inputs = self._controls()
                self.bar = RunBar(studio, "Generate", "generate")
            with gr.Column(scale=3, min_width=300):
                self.hint = gr.HTML(parts.note(HINT))
                self.missing = gr.HTML(self._missing(), elem_id="generate-missing")
                with gr.Row(elem_classes="panels"):
                    self.panels = (Panel("first"), Panel("second"))
        results = [output for panel in self.panels for output in panel.outputs]
        outputs = [*self.bar.outputs, self.hint, *results]
        self.bar.start.click(
            self.run,
            inputs,
            outputs,
            api_name="generate",
            concurrency_limit=None,
            show_progress="hidden",
        )
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        chosen, controls = [self.model, self.beside], self.asking.outputs
        typed = self.asking.typed
        self.model.change(
            self.follow,
            [*chosen, self.sampling.last, *typed],
            [self.about, *controls, *self.sampling.outputs],
            **private,
        )
        self.beside.change(self.follow_beside, [*chosen, *typed], controls, **private)

    def _controls(self) -> list[Any]:
        keys = self.studio.keys(*MODELS)
        self.model = checked_here(gr.Dropdown(keys, label="Model", elem_id="generate-model"))
        self.beside = checked_here(
            gr.Dropdown(
                [NOTHING, *keys],
                label="Beside it",
                info="Another model, from the same seeds",
                elem_id="generate-beside",
            )
        )
        known = self.studio.about(keys[0])
        self.about = gr.HTML(says(keys[0], known), elem_id="generate-about")
        self.asking = Asking("generate", known, own="The model's own")
        with gr.Row():
            count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Images", min_width=120)
            seed = gr.Number(0, precision=0, label="Seed", min_width=120)
        with gr.Accordion("Sampling", open=False):
            self.sampling = Sampling(known)
        drawn_by = [count, seed, self.sampling.last, *self.sampling.inputs]
        return [self.model, self.beside, *self.asking.inputs, *drawn_by]

    def pickers(self, model: str | None, beside: str | None) -> Updates:
        """The pickers with the present models; a choice that still exists stays."""
        keys, artifacts = self.studio.keys(*MODELS), self.studio.keys(Kind.artifact)
        first = artifacts[0] if artifacts else NOTHING
        return {
            self.model: refilled(keys, model, keys[0]),
            self.beside: refilled([NOTHING, *keys], beside, first),
            self.missing: self._missing(),
        }

    def follow(self, model: str, beside: str, last: Any, *typed: Any) -> Updates:
        """The controls that the chosen models want."""
        with toasts():
            known = [self.studio.about(key) for key in chosen_of(model, beside)]
        return {
            self.about: says(model, known[0]),
            **self.asking.updates(known, *typed),
            **self.sampling.updates(last, known[0]),
        }

    def follow_beside(self, model: str, beside: str, *typed: Any) -> Updates:
        with toasts():
            known = [self.studio.about(key) for key in chosen_of(model, beside)]
            return self.asking.shown(known, *typed)

    def _missing(self) -> str:
        """How to make a quantized model, if there is none."""
        return "" if self.studio.keys(Kind.artifact) else parts.command(MISSING, self.example)

    async def run(
        self,
        model: str,
        beside: str,
        *rest: Any,
    ) -> AsyncIterator[Updates]:
        """Queue a drawing with `model`, then one with `beside`, and follow both."""
        with toasts():
            entries = [self.studio.model(key) for key in chosen_of(model, beside)]
            request = Request.checked(Wish.of(*rest[:4]), *rest[4:])
            second = entries[1] if len(entries) > 1 else None
            panels = {**self.panels[0].clear(entries[0]), **self.panels[1].clear(second)}
            yield {self.hint: "", **panels}
            for panel, entry in zip(self.panels, entries, strict=False):
                known = await asyncio.to_thread(self.studio.about, entry.key)
                title = f"{request.count} of {request.wish.title(known.texts)}"[:40]
                job = self.studio.jobs.submit(
                    entry.key, title, partial(draw, self.studio, entry, request)
                )
                steps: list[Pixels] = []
                async for updates in self.bar.follow(job, partial(panel.show, steps)):
                    yield updates
                if job.stopped:
                    return
