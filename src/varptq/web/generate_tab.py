"""The tab Generate: images of a class from one model, or from two beside each other.

Image i of both models draws from (seed, i), so the columns are comparable. While a model runs, its
column shows every scale, coarse to fine; the time for decoding these is not counted.
"""

from __future__ import annotations

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
from varptq.models.generate import ScaleEvent, generate
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import SamplingSettings
from varptq.pictures import VISIBLE_SIDE, Pixels, to_pixels
from varptq.torch_state import plain_torch
from varptq.web import parts
from varptq.web.catalogue import Entry, Kind
from varptq.web.files import offer_picture, stem
from varptq.web.jobs import Job
from varptq.web.loaded import about, class_choices
from varptq.web.runbar import RunBar, Updates
from varptq.web.studio import (
    MAX_SEED,
    MODELS,
    Studio,
    checked_here,
    class_picker,
    refilled,
    says,
    toasts,
    whole,
)

MAX_COUNT, MAX_TOP_K = 16, 4096
NOTHING = "nothing"
HINT = "Choose a class and generate. Two models draw side by side, from the same seeds."
DEFAULTS = SamplingSettings()
MISSING = "There is no quantized model yet. Make one in the tab Quantize, or in a shell: "


@dataclass(frozen=True)
class Request:
    """What to draw, the same for both models."""

    name: str
    count: int
    seed: int
    settings: SamplingSettings

    @classmethod
    def checked(
        cls, name: object, count: object, seed: object, cfg: Any, top_k: object, top_p: Any
    ) -> Request:
        """From what a page sent. Raises `InputError` or `ConfigError`."""
        settings = SamplingSettings(cfg=cfg, top_k=whole("top-k", top_k, 0, MAX_TOP_K), top_p=top_p)
        return cls(
            str(name or "").strip(),
            whole("images", count, 1, MAX_COUNT),
            whole("seed", seed, 0, MAX_SEED),
            settings,
        )


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
    pipe = studio.models.get(entry)
    shown = 0.0
    asked = pipe.prompts([request.name] * request.count)
    name = stem(asked.titles()[0], request.seed)

    def on_scale(event: ScaleEvent) -> None:
        nonlocal shown
        job.progress("drawing", event.scale + 1, len(pipe.scales.sides))
        started = time.monotonic()
        job.emit(Drawing(decoded(pipe, event.f_hat), name, event.scale, len(pipe.scales.sides)))
        shown += time.monotonic() - started

    sampling = request.settings.to_dict()
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
    last = len(pipe.scales.sides)
    facts = facts_of(pipe, request.count, spent)
    job.emit(Drawing(to_pixels(output.images), name, last, last, facts))


@plain_torch()
@torch.inference_mode()
def decoded(pipe: Pipeline, f_hat: torch.Tensor) -> Pixels:
    """(B, H, W, 3) pictures of features that are not complete yet."""
    return to_pixels(pipe.vae.decode_features(f_hat).float().add(1).mul(0.5))


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
        self.model.change(
            self.classes,
            self.model,
            [self.name, self.about],
            api_visibility="private",
            show_progress="hidden",
        )

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
        known = about(self.studio.model(keys[0]))
        self.name = gr.Dropdown(
            class_choices(known),
            label="Class",
            info="Type to search; a name or an id",
            allow_custom_value=True,
            elem_id="generate-class",
        )
        self.about = gr.HTML(says(keys[0], known), elem_id="generate-about")
        with gr.Row():
            count = gr.Slider(1, MAX_COUNT, value=4, step=1, label="Images", min_width=120)
            seed = gr.Number(0, precision=0, label="Seed", min_width=120)
        with gr.Accordion("Sampling", open=False):
            cfg = gr.Slider(0, 10, value=DEFAULTS.cfg, step=0.1, label="Guidance (cfg)")
            top_k = gr.Slider(0, MAX_TOP_K, value=DEFAULTS.top_k, step=1, label="Top-k, 0 for all")
            top_p = gr.Slider(0, 1, value=DEFAULTS.top_p, step=0.01, label="Top-p, 1 for all")
        return [self.model, self.beside, self.name, count, seed, cfg, top_k, top_p]

    def pickers(self, model: str | None, beside: str | None) -> Updates:
        """The pickers with the present models; a choice that still exists stays."""
        keys, artifacts = self.studio.keys(*MODELS), self.studio.keys(Kind.artifact)
        first = artifacts[0] if artifacts else NOTHING
        return {
            self.model: refilled(keys, model, keys[0]),
            self.beside: refilled([NOTHING, *keys], beside, first),
            self.missing: self._missing(),
        }

    def classes(self, model: str) -> Updates:
        with toasts():
            known = about(self.studio.model(model))
        return {self.name: class_picker(known), self.about: says(model, known)}

    def _missing(self) -> str:
        """How to make a quantized model, if there is none."""
        return "" if self.studio.keys(Kind.artifact) else parts.command(MISSING, self.example)

    async def run(
        self,
        model: str,
        beside: str,
        name: str,
        count: float,
        seed: float,
        cfg: float,
        top_k: float,
        top_p: float,
    ) -> AsyncIterator[Updates]:
        """Queue a drawing with `model`, then one with `beside`, and follow both."""
        with toasts():
            request = Request.checked(name, count, seed, cfg, top_k, top_p)
            chosen = [model] if beside in (None, "", NOTHING) else [model, beside]
            entries = [self.studio.model(key) for key in chosen]
            second = entries[1] if len(entries) > 1 else None
            panels = {**self.panels[0].clear(entries[0]), **self.panels[1].clear(second)}
            yield {self.hint: "", **panels}
            for panel, entry in zip(self.panels, entries, strict=False):
                title = f"{request.count} of {request.name}"[:40]
                job = self.studio.jobs.submit(
                    entry.key, title, partial(draw, self.studio, entry, request)
                )
                steps: list[Pixels] = []
                async for updates in self.bar.follow(job, partial(panel.show, steps)):
                    yield updates
                if job.stopped:
                    return
