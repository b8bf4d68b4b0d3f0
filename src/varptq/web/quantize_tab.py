"""The tab Quantize: choose a method and bits, watch the calibration, get the artifact.

A calibration continues when its page is closed. A page opened meanwhile shows it and can stop it.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from varptq import readable
from varptq.artifact import save
from varptq.artifact.format import CONFIG_FILE
from varptq.artifact.sizes import quantized_size, transformer_size
from varptq.calibrate.config import EFFORTS, CalibrationConfig
from varptq.calibrate.config import PRESETS as CALIBRATIONS
from varptq.calibrate.forecast import Forecast, forecast
from varptq.calibrate.methods import METHODS, Method, default_method
from varptq.calibrate.quantize import quantize
from varptq.errors import InputError, OutputError
from varptq.models.memory import free_bytes
from varptq.models.texts import TextPrompts
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.resolve import Choice, foreseen, told
from varptq.web import parts
from varptq.web.asking import PromptList
from varptq.web.catalogue import Entry, Kind
from varptq.web.files import offer, prompts
from varptq.web.jobs import Job
from varptq.web.losses import Losses
from varptq.web.runbar import RunBar, Updates
from varptq.web.studio import MAX_SEED, Studio, checked_here, refilled, toasts, whole

KIND = "quantize"
CONFIGS = (
    *("w4a4", "bops1", "best", "w2a8", "w3a8", "w4a8", "w6a6", "w8a8"),
    *("w4a4+litevar", "w6a6+litevar", "w4a4+paper"),
)
# The choice that lets `default_method` decide.
DEFAULT = "default"
DEFAULT_SUMMARY = "the one these bits were measured with"
EFFORTS_FIRST = (*EFFORTS, *(name for name in CALIBRATIONS if name not in EFFORTS))
MAX_SAMPLES, MAX_STEPS = 4096, 20_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
DRAW_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """What to make, checked before anything is calibrated. prompts: for a model that reads
    texts."""

    config: QuantConfig
    method: str
    calibration: CalibrationConfig
    seed: int
    name: str
    replace: bool
    prompts: list[str] | TextPrompts | None = None

    @classmethod
    def checked(
        cls,
        config: object,
        method: object,
        calibration: object,
        samples: object,
        steps: object,
        seed: object,
        name: object,
        replace: object,
        prompt_file: str | None = None,
        typed: object = None,
    ) -> Request:
        """From what a page sent; 0 samples or steps mean those of the preset. Raises
        `ConfigError` or `InputError`."""
        given = {
            "num_samples": whole("samples", samples or 0, 0, MAX_SAMPLES),
            "steps": whole("steps", steps or 0, 0, MAX_STEPS),
        }
        base = CalibrationConfig.preset(str(calibration))
        settings = base.replace(**{key: value for key, value in given.items() if value})
        quant_config = QuantConfig.preset(str(config))
        if method in (None, DEFAULT):
            method = default_method(quant_config, settings)
        Method.parse(str(method))
        name = str(name or "").strip()
        if not NAME.fullmatch(name):
            raise InputError(
                f"name {name!r}: expected at most 64 letters, digits and . _ + -, beginning with "
                "a letter or digit"
            )
        return cls(
            quant_config,
            str(method),
            settings,
            whole("seed", seed, 0, MAX_SEED),
            name,
            bool(replace),
            prompts(prompt_file, typed),
        )

    def place(self, out: Path) -> Path:
        """The artifact's folder. Raises `OutputError` now for what `save` would refuse at the
        end."""
        target = out / self.name
        if target.exists() and not (self.replace and (target / CONFIG_FILE).is_file()):
            raise OutputError(f"name {self.name!r}: exists; choose another or tick Replace")
        return target


@dataclass(frozen=True)
class Plan:
    """What a calibration will do and take, said before it starts."""

    choice: Choice
    forecast: Forecast
    free: int | None

    @property
    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        return [(name.capitalize(), text) for name, text in self.forecast.rows(self.free)]


@dataclass(frozen=True)
class Made:
    """The artifact, its summary, and a text about every reconstructed unit."""

    folder: Path
    rows: tuple[tuple[str, str], ...]
    losses: Losses
    units: Mapping[str, str]


def compute(studio: Studio, entry: Entry, request: Request, job: Job) -> Made:
    """Quantize and save; emit a `Plan` before, and `Losses` at intervals."""
    target = request.place(studio.out)
    pipe = studio.models.get(entry)
    parts_on = Method.parse(request.method)
    losses = Losses(parts_on.settle(request.calibration).steps_per_unit)
    asked: dict[str, Any] = {
        "method": request.method,
        "calibration": request.calibration,
        "prompts": request.prompts if pipe.var.READS_TEXTS else None,
    }
    choice = foreseen(pipe.var, request.config, shift=parts_on.shift)
    said = forecast(pipe, request.config, **asked, briefly=True, progress=job.progress)
    job.emit(Plan(choice, said, free_bytes(pipe.device)))
    drawn = 0.0

    def progress(stage: str, done: int, total: int, info: str = "") -> None:
        nonlocal drawn
        job.progress(stage, done, total, info)
        losses.note(stage, done, info)
        if time.monotonic() - drawn >= DRAW_SECONDS:
            drawn = time.monotonic()
            job.emit(losses)

    quantized = quantize(pipe, request.config, **asked, seed=request.seed, progress=progress)
    job.progress("saving", 0, 1)
    save(quantized, target, force=request.replace)
    made = Made(target, rows_of(quantized, job.seconds), losses, units_of(quantized))
    job.emit(made)
    return made


def rows_of(pipe: QuantizedPipeline, spent: float) -> tuple[tuple[str, str], ...]:
    """The summary for people."""
    transformer = transformer_size(pipe)
    smaller = transformer.float32_bytes / transformer.bytes
    units = pipe.report.get("units", [])
    nearest = sum(unit["kept"] == "nearest" for unit in units)
    drawn_for = pipe.report.get("prompts")
    prompts_row = (("Prompts", f"{drawn_for['count']} texts"),) if drawn_for else ()
    return (
        ("Model", f"{pipe.name}, {pipe.config.name}, {pipe.method}"),
        ("Size", f"{readable.megabytes(transformer.bytes)}, {smaller:.1f}x smaller than float32"),
        *prompts_row,
        ("Weights", f"{quantized_size(pipe).bits_per_element:.2f} bits each, with scales"),
        (
            "Units",
            f"{len(units)} reconstructed, {nearest} kept nearest" if units else "nearest rounding",
        ),
        ("Runs on", told(pipe.var).runs_on),
        ("Theta", "off" if pipe.theta is None else f"{pipe.theta:.4f}"),
        ("Time", readable.seconds(spent)),
    )


def units_of(pipe: QuantizedPipeline) -> dict[str, str]:
    """For every unit, its loss with nearest rounding and with the codes that were kept, both
    measured on the same rows; the steps of a curve are measured on a few rows each."""
    says = {}
    for unit in pipe.report.get("units", []):
        kept = unit["kept"]
        loss = unit.get(f"loss_{kept}", unit["loss_hard"])
        says[unit["name"]] = f"{unit['loss_nearest']:.2g} to {loss:.2g}, {kept}"
    return says


def method_choices() -> dict[str, str]:
    """Names of methods with a summary of each, the default first."""
    return {DEFAULT: DEFAULT_SUMMARY, **{name: m.summary for name, m in METHODS.items()}}


class QuantizeTab:
    """Builds the tab where it is made, with its events."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(elem_classes="tab"):
            with gr.Column(scale=1, min_width=300, elem_classes="controls"):
                inputs = self._controls()
                self.bar = RunBar(studio, "Quantize", "quantize")
                # Where whoever pressed the button looks.
                self.plan = gr.HTML(elem_id="quantize-plan")
            with gr.Column(scale=2, min_width=300):
                self.summary = gr.HTML(
                    parts.note("The loss of every unit appears here while it is learned."),
                    elem_id="quantize-summary",
                )
                self.download = gr.DownloadButton(
                    "Download the artifact (.zip)", visible=False, elem_id="quantize-download"
                )
                self.curves = gr.HTML(elem_id="quantize-curves")
        self._events(inputs)

    def _controls(self) -> list[Any]:
        keys = self.studio.keys(Kind.float)
        self.model = checked_here(gr.Dropdown(keys, label="Float model", elem_id="quantize-model"))
        self.config = gr.Dropdown(
            list(CONFIGS),
            value=CONFIGS[0],
            label="Bits",
            info="w<bits>a<bits>, with +litevar, +qk6, +v6, ...",
            allow_custom_value=True,
            elem_id="quantize-config",
        )
        self.method = gr.Radio(
            [
                (f"{name}: {summary}" if summary else name, name)
                for name, summary in method_choices().items()
            ],
            value=DEFAULT,
            label="Method",
            elem_id="quantize-method",
        )
        calibration = gr.Dropdown(
            [(f"{name}: {effort(name)}", name) for name in EFFORTS_FIRST],
            value=EFFORTS[0],
            label="Calibration",
            elem_id="quantize-calibration",
        )
        self.prompts = PromptList("quantize", self.studio.about(keys[0]))
        with gr.Accordion("Single settings", open=False, elem_id="quantize-settings"):
            samples = gr.Number(
                0, precision=0, label="Images, 0 as in the preset", elem_id="q-samples"
            )
            steps = gr.Number(0, precision=0, label="Steps, 0 as in the preset", elem_id="q-steps")
            seed = gr.Number(0, precision=0, label="Seed")
        self.name = gr.Textbox(
            suggested_name(keys[0], CONFIGS[0], DEFAULT),
            label="Name of the artifact",
            max_lines=1,
            elem_id="quantize-name",
        )
        replace = gr.Checkbox(label="Replace an artifact of that name")
        settings = [self.config, self.method, calibration, samples, steps, seed]
        return [*settings, self.name, replace, *self.prompts.inputs]

    def _events(self, inputs: list[Any]) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        results = [self.plan, self.summary, self.curves, self.download]
        self.outputs = [*self.bar.outputs, *results]
        self.bar.start.click(
            self.run,
            [self.model, *inputs],
            self.outputs,
            api_name="quantize",
            concurrency_limit=None,
            show_progress="hidden",
        )
        chosen = [self.model, self.config, self.method]
        for picker in chosen:
            picker.change(suggested_name, chosen, self.name, **private)
        self.model.change(self.follow, self.model, self.prompts.outputs, **private)

    def pickers(self, model: str | None) -> Updates:
        """The picker with the present models; a choice that still exists stays."""
        keys = self.studio.keys(Kind.float)
        return {self.model: refilled(keys, model, keys[0])}

    def follow(self, model: str) -> Updates:
        """The controls that the chosen model wants."""
        with toasts():
            return self.prompts.updates(self.studio.about(model))

    async def run(self, model: str, *rest: Any) -> AsyncIterator[Updates]:
        """Queue the calibration, and follow it."""
        with toasts():
            entry = self.studio.model(model, Kind.float)
            request = Request.checked(*rest)
            request.place(self.studio.out)
            job = self.studio.jobs.submit(
                entry.key,
                f"{request.method} {request.config.name}",
                partial(compute, self.studio, entry, request),
                kind=KIND,
            )
            cleared = dict.fromkeys((self.plan, self.summary, self.curves), "")
            yield {**cleared, self.download: gr.update(visible=False)}
            async for updates in self.bar.follow(job, self._show, keep=True):
                yield updates

    async def resume(self) -> AsyncIterator[Updates]:
        """Follow a running calibration on a page that has just opened."""
        going = [job for job in self.studio.jobs.listed() if job.kind == KIND]
        if not going:
            # Yielding nothing would clear the page, button labels included.
            yield gr.skip()
            return
        with toasts():
            async for updates in self.bar.follow(going[0], self._show, keep=True):
                yield updates

    def _show(self, part: Losses | Made | Plan) -> Updates:
        if isinstance(part, Plan):
            note = parts.note(f"Will run on: {part.choice.runs_on}")
            return {self.plan: parts.facts(part.rows), self.summary: note}
        if isinstance(part, Losses):
            return {self.curves: parts.curves(part.curves())}
        rows = [*part.rows, ("Written", f"{part.folder.name}, now in the lists of all tabs")]
        curves = parts.curves(part.losses.curves(), part.units)
        archive = offer(self.download, part.folder)
        return {
            self.summary: parts.facts(rows),
            self.curves: curves,
            self.download: gr.update(value=archive, visible=True),
        }


def effort(calibration: str) -> str:
    """What a preset of `CalibrationConfig` does, in a few words."""
    config = CalibrationConfig.preset(calibration)
    learning = f"up to {config.steps} steps a unit" if config.learns else "closed form"
    if config.learns and not config.says_rounding:
        learning += " where the method learns"
    tuning = ", then tuned end to end" if config.tune_steps else ""
    return f"{learning}, {config.num_samples} images{tuning}"


def suggested_name(model: str | None, config: str | None, method: str | None) -> str:
    """A name made from model, config and method."""
    return readable.name_of(model, config, None if method == DEFAULT else method)
