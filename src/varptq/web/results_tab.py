"""The tab Results: reports of `varptq evaluate` and `varptq analyze`, made here or elsewhere.

A report is a self-contained page, shown in a frame without scripts. The pictures of an analysis are
shown as they are.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from varptq import readable
from varptq.errors import InputError
from varptq.evaluate.report.markup import Markup
from varptq.web import parts
from varptq.web.catalogue import ANALYSIS_FILE, REPORT_FILE, Entry, Kind
from varptq.web.files import offer
from varptq.web.jobs import Job, State
from varptq.web.measuring import analyze, evaluate, report_folder
from varptq.web.runbar import RunBar, Updates
from varptq.web.studio import MODELS, Studio, checked_here, refilled, toasts, whole

SHOWN = (Kind.report, Kind.analysis)
EVALUATE, ANALYZE = "Evaluate", "Analyze"
VERBS = {
    f"{EVALUATE}: images compared with the float model's": Kind.report,
    f"{ANALYZE}: which tensor costs what": Kind.analysis,
}
MAX_IMAGES = 50_000
MAX_PAGE_BYTES = 40_000_000
NOTHING_YET = (
    "No report yet. Choose a model and make one, or start the studio with a folder of reports."
)


class ResultsTab:
    """Builds the tab where it is made, with its events."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(elem_classes="tab"):
            with gr.Column(scale=1, min_width=280, elem_classes="controls"):
                self.report = checked_here(
                    gr.Dropdown(studio.keys(*SHOWN), label="Report", elem_id="results-report")
                )
                self.download = gr.DownloadButton(
                    "Download", visible=False, elem_id="results-download"
                )
                with gr.Accordion("Make a report", open=True):
                    self.model = checked_here(
                        gr.Dropdown(studio.keys(*MODELS), label="Model", elem_id="results-model")
                    )
                    verb = gr.Radio(
                        list(VERBS.items()), value=Kind.report, label="What", elem_id="results-what"
                    )
                    count = gr.Number(
                        20,
                        precision=0,
                        label="Images",
                        info="More images give more precise numbers",
                        elem_id="results-count",
                    )
                    self.bar = RunBar(studio, "Measure", "results")
            with gr.Column(scale=3, min_width=300):
                self.page = gr.HTML(parts.note(NOTHING_YET), elem_id="results-page")
        self._events([self.model, verb, count])

    def _events(self, inputs: list[Any]) -> None:
        self.bar.start.click(
            self.run,
            inputs,
            [*self.bar.outputs, *self.shown],
            api_name="measure",
            concurrency_limit=None,
            show_progress="hidden",
        )
        self.report.input(
            self.show,
            self.report,
            self.shown,
            api_visibility="private",
            show_progress="hidden",
        )

    @property
    def shown(self) -> list[Any]:
        return [self.report, self.page, self.download]

    def pickers(self, report: str | None, model: str | None) -> Updates:
        """The pickers with the present entries, and the report; a choice that still exists
        stays."""
        keys, reports = self.studio.keys(*MODELS), self.studio.keys(*SHOWN)
        artifacts = self.studio.keys(Kind.artifact) or keys
        first = reports[0] if reports else None
        return {
            **self.show(report if report in reports else first),
            self.model: refilled(keys, model, artifacts[0]),
        }

    def show(self, key: str | None) -> Updates:
        """The report of that key."""
        if not key:
            nothing = {self.page: parts.note(NOTHING_YET), self.download: gr.update(visible=False)}
            return {self.report: gr.update(choices=[], value=None), **nothing}
        with toasts():
            entry = self.studio.catalogue.find(key, *SHOWN)
            page, file = view(entry)
            offered = offer(self.download, entry.files[0] / file)
        update = gr.update(value=offered, visible=True, label=f"Download {file}")
        choices = gr.update(choices=self.studio.keys(*SHOWN), value=key)
        return {self.report: choices, self.page: page, self.download: update}

    async def run(self, model: str, what: object, count: object) -> AsyncIterator[Updates]:
        """Queue a report, follow it, and show it."""
        with toasts():
            if what not in SHOWN:
                raise InputError(f"report {what!r}: expected one of {', '.join(SHOWN)}")
            kind = Kind(str(what))
            entry = self.studio.model(model)
            number = whole("images", count, 1, MAX_IMAGES)
            title = f"{'evaluate' if kind is Kind.report else 'analyze'}, {number} images"
            work = partial(self._measure, kind, entry, number)
            job = self.studio.jobs.submit(entry.key, title, work)
            async for updates in self.bar.follow(job, lambda _: {}):
                yield updates
            if job.state is State.done:
                yield self.show(job.result)

    def _measure(self, kind: Kind, entry: Entry, number: int, job: Job) -> str:
        """Make the report and return its key."""
        studio = self.studio
        folder = report_folder(studio.out, entry, kind)
        if kind is Kind.report:
            evaluate(entry, folder, number, studio.catalogue, studio.models, job)
        else:
            analyze(entry, folder, number, studio.catalogue, studio.models, job)
        made = [e.key for e in studio.catalogue.entries(kind) if e.files == (folder,)]
        return made[0]


def view(entry: Entry) -> tuple[parts.Markup, str]:
    """What the page shows of a report, and the file to download. Raises `InputError` for a page
    that is too large to show."""
    folder = entry.files[0]
    if entry.kind is Kind.analysis:
        names = sorted(path for path in folder.glob("*.png") if path.is_file())
        pictures = parts.pictures({path.stem: path.read_bytes() for path in names})
        return Markup(parts.facts(suggested(folder / ANALYSIS_FILE)) + pictures), ANALYSIS_FILE
    page = folder / REPORT_FILE
    if (size := page.stat().st_size) > MAX_PAGE_BYTES:
        raise InputError(f"report {entry.key}: {readable.megabytes(size)}, too large to show here")
    return parts.page_frame(page.read_text(encoding="utf-8"), f"Report {entry.key}"), REPORT_FILE


def suggested(file: Path) -> list[tuple[str, str]]:
    """What `varptq analyze` measured and suggests, for people; empty if another version wrote the
    file."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        name, found = document["config"]["name"], document["suggestion"]
        base, mixed = (found["verified"][which]["kl"] for which in ("base", "mixed"))
        operations = found["bops"] / document["base"]["bops"]
        count = len(found["picks"])
        return [
            ("Model", f"{document['model']}, {name}"),
            ("Suggested", f"{count} tensors at more bits, {operations:.2f}x bit operations"),
            ("KL", f"{base:.4f} to {mixed:.4f} nats per token, on images not used for the choice"),
        ]
    except (ValueError, LookupError, TypeError, ZeroDivisionError):
        return []
