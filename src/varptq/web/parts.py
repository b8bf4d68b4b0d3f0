"""Pieces of pages that are HTML: a line of progress, facts, the queue, curves of the losses.

All text goes through `markup.element`, which escapes it. Colours are variables of studio.css.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from varptq.evaluate.report.markup import Markup, element
from varptq.pictures import Pixels
from varptq.readable import seconds
from varptq.web.jobs import Job, State

CURVE_WIDTH, CURVE_HEIGHT, CURVE_POINTS = 160.0, 44.0, 80
STRIP_SIDE = 128
WORDS = {State.done: "Done", State.failed: "Failed", State.stopped: "Stopped"}


def status(job: Job, ahead: int) -> Markup:
    """One line about a job, with a bar while it runs."""
    if job.state is State.waiting:
        jobs = "1 job" if ahead == 1 else f"{ahead} jobs"
        text = f"Waiting, {jobs} ahead on {job.model}" if ahead else f"Waiting for {job.model}"
        return _line("waiting", text)
    if job.state is not State.running:
        return _line(job.state.value, f"{WORDS[job.state]} after {seconds(job.seconds)}")
    text = job.stage or f"loading {job.model}"
    if job.total > 1:
        text += f", {job.done} of {job.total}"
    if job.info:
        text += f" ({job.info})"
    bar = element(
        "progress", value=job.done, max=max(job.total, 1), aria_label=job.stage or "loading"
    )
    return _line("running", text, bar, seconds(job.seconds) if job.seconds >= 1 else "")


def _line(kind: str, text: str, *more: object) -> Markup:
    # A polite live region: a screen reader hears what has changed.
    return element(
        "div",
        element("span", text),
        *more,
        class_=f"status {kind}",
        role="status",
        aria_live="polite",
    )


def facts(rows: Sequence[tuple[str, str]]) -> Markup:
    """Names and values in a list."""
    pairs = [element("div", element("dt", name), element("dd", value)) for name, value in rows]
    return element("dl", *pairs, class_="facts")


def note(text: str) -> Markup:
    return element("p", text, class_="note")


def command(says: str, line: str) -> Markup:
    """A note that ends in a line for the shell."""
    return element("p", says, element("code", line), class_="note")


def heading(text: str, tone: str = "") -> Markup:
    """Title of a column; tone "float" or "quantized" colours it as the report does."""
    return element("h3", text, class_=f"column {tone}".strip())


def queue(jobs: Sequence[Job]) -> Markup:
    """Every job that runs or waits, for the top of all pages."""
    if not jobs:
        return element("div", "No job is running", class_="queue idle")
    items: list[Markup] = []
    for job in jobs:
        share = f" {job.done / job.total:.0%}" if job.state is State.running and job.total else ""
        text = f"{job.model}: {job.title}, {job.state.value}{share}"
        items.append(element("li", text, class_=job.state.value))
    return element("ul", *items, class_="queue", aria_label="Jobs")


def curves(
    losses: Mapping[str, Sequence[tuple[int, float]]], says: Mapping[str, str] | None = None
) -> Markup:
    """One small curve of (step, loss) per unit, each on its own scale, log upwards; below it
    the text of the unit in `says`, or its first and last loss."""
    known = says or {}
    drawn = (_curve(n, points, known.get(n)) for n, points in losses.items())
    return element("div", *drawn, class_="curves")


def _curve(name: str, points: Sequence[tuple[int, float]], says: str | None) -> Markup:
    first, last = points[0][1], points[-1][1]
    says = says or f"{first:.3g} to {last:.3g}"
    caption = element("figcaption", element("b", name), element("span", says))
    heights = [math.log(max(loss, 1e-30)) for _, loss in points]
    low, span = min(heights), (max(heights) - min(heights)) or 1.0
    last_step = points[-1][0] or 1
    corners = [
        f"{step / last_step * CURVE_WIDTH:.1f} {(1 - (h - low) / span) * CURVE_HEIGHT + 2:.1f}"
        for (step, _), h in zip(points, heights, strict=True)
    ]
    path = element("path", d="M" + "L".join(corners))
    box = f"0 0 {CURVE_WIDTH:g} {CURVE_HEIGHT + 4:g}"
    picture = element(
        "svg",
        path,
        viewBox=box,
        preserveAspectRatio="none",
        role="img",
        aria_label=f"Loss of {name}: {says}",
    )
    return element("figure", picture, caption)


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `CURVE_POINTS` means of neighbours, as the loss of a batch is noisy."""
    size = -(-len(points) // CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def page_frame(page: str, title: str) -> Markup:
    """A whole HTML page in a frame that runs no script and loads nothing."""
    return element("iframe", srcdoc=page, sandbox="", title=title, class_="page", tabindex=0)


def strip(images: Sequence[Pixels], says: str) -> Markup:
    """Small pictures (H, W, 3) in a line, embedded in the page."""
    pictures = [
        element("img", src=_data(image), alt=f"{says}, {i} of {len(images)}", class_="pixels")
        for i, image in enumerate(images, start=1)
    ]
    return element("figure", element("figcaption", says), element("div", *pictures), class_="strip")


def pictures(files: Mapping[str, bytes]) -> Markup:
    """PNG files one below the other, each under its name."""
    return element(
        "div",
        *(element("img", src=_png(content), alt=name) for name, content in files.items()),
        class_="pictures",
    )


def _data(image: Pixels) -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    picture.thumbnail((STRIP_SIDE, STRIP_SIDE))
    picture.save(buffer, format="PNG")
    return _png(buffer.getvalue())


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
