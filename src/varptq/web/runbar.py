"""The row of every tab with a button to start, one to stop, and a line of progress."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr

from varptq.web import parts
from varptq.web.jobs import Job, follow
from varptq.web.studio import Studio

Updates = dict[Any, Any]


class RunBar:
    """Builds the row where it is made. `outputs` are its components, for events that follow."""

    def __init__(self, studio: Studio, label: str, name: str) -> None:
        self.jobs = studio.jobs
        self.job_id = gr.State("")
        with gr.Row(elem_classes="runbar"):
            self.start = gr.Button(label, variant="primary", elem_id=f"{name}-start", scale=3)
            self.stop = gr.Button(
                "Stop", interactive=False, elem_id=f"{name}-stop", scale=1, min_width=80
            )
        self.status = gr.HTML(elem_id=f"{name}-status")
        self.stop.click(self.jobs.stop, self.job_id, None, queue=False, api_visibility="private")

    @property
    def outputs(self) -> list[Any]:
        return [self.start, self.stop, self.status, self.job_id]

    async def follow(
        self, job: Job, show: Callable[[Any], Updates], *, keep: bool = False
    ) -> AsyncIterator[Updates]:
        """Updates of the page while `job` runs; `show` turns a part of its result into updates.

        At the end the buttons are as before; what the work raised is raised then.
        """
        yield {
            self.job_id: job.id,
            self.start: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
        }
        try:
            async for part in follow(self.jobs, job, keep=keep):
                updates = {} if part is None else show(part)
                yield {self.status: parts.status(job, self.jobs.ahead(job)), **updates}
        except Exception:
            yield self._idle(job)
            raise
        yield self._idle(job)

    def _idle(self, job: Job) -> Updates:
        return {
            self.job_id: "",
            self.start: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
            self.status: parts.status(job, 0),
        }
