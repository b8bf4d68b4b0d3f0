"""The page: a head with the queue, a tab per task, and the events that refresh them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from varptq.web import parts
from varptq.web.edit_tab import EditTab
from varptq.web.files import only_cached
from varptq.web.generate_tab import GenerateTab
from varptq.web.quantize_tab import QuantizeTab
from varptq.web.results_tab import ResultsTab
from varptq.web.studio import Studio

QUEUE_SECONDS = 1.5
# Uploaded and shown files are deleted after a day; checked every hour.
CACHE = (3600, 24 * 3600)
MAX_EVENTS = 1000


def build(studio: Studio) -> gr.Blocks:
    """The studio as a Gradio app, not started."""
    with gr.Blocks(
        title="varptq studio", analytics_enabled=False, fill_width=True, delete_cache=CACHE
    ) as blocks:
        with gr.Row(elem_classes="head"):
            gr.HTML("<h1>varptq studio</h1>")
            queue = gr.HTML(parts.queue([]), elem_id="queue")
        with gr.Tabs():
            with gr.Tab("Generate") as first:
                generate = GenerateTab(studio)
            with gr.Tab("Edit") as second:
                edit = EditTab(studio)
            with gr.Tab("Quantize") as third:
                quantize = QuantizeTab(studio)
            with gr.Tab("Results") as fourth:
                results = ResultsTab(studio)
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # Folders change while pages are open, so the pickers are filled whenever their tab is
        # opened.
        for tab, pickers, chosen, besides in (
            (first, generate.pickers, [generate.model, generate.beside], [generate.missing]),
            (second, edit.pickers, [edit.model], []),
            (third, quantize.pickers, [quantize.model], []),
        ):
            for event in (blocks.load, tab.select):
                event(pickers, chosen, [*chosen, *besides], **private)
        chosen = [results.report, results.model]
        fourth.select(results.pickers, chosen, [*results.shown, results.model], **private)
        blocks.load(quantize.resume, None, quantize.outputs, concurrency_limit=None, **private)
        gr.Timer(QUEUE_SECONDS).tick(
            lambda: parts.queue(studio.jobs.listed()),
            None,
            queue,
            api_name="queue",
            show_progress="hidden",
        )
    for block in blocks.blocks.values():
        only_cached(block)
    send_whole(blocks)
    return blocks.queue(default_concurrency_limit=None, max_size=MAX_EVENTS, api_open=False)


def send_whole(blocks: gr.Blocks) -> None:
    """Let an event that yields send whole values, in place of their differences from the values
    before.

    The page of Gradio 6 changes the object of one message into that of the next. Of messages that
    arrive together it then sees the last alone: buttons stayed grey, and pictures were missing.
    """
    differences = blocks.handle_streaming_diffs

    def whole(
        block_fn: Any,
        data: list[Any],
        session_hash: str | None,
        run: Any,
        final: bool,
        simple_format: bool = False,
    ) -> list[Any]:
        known = session_hash in blocks.pending_diff_streams
        first = not (known and run in blocks.pending_diff_streams[session_hash])
        sent = differences(block_fn, data, session_hash, run, final, simple_format=True)
        if first or final or simple_format:
            return sent
        return [[["replace", [], value]] for value in sent]

    blocks.handle_streaming_diffs = whole
