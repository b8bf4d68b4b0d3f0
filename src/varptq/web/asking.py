"""What a picture is asked for, and how it is drawn: the controls that follow the chosen models.

A model that knows classes gets a picker of them, one that reads texts a box with examples and a
second one for what to stay away from, one that draws at several sizes a picker of these. The
sliders start from the chosen model's own settings, and again when a model with other ones is
chosen, so that a change of the bits leaves them where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.models.prompt_files import bundled_prompts
from varptq.models.prompts import Prompts
from varptq.models.sampling import PerScale, SamplingSettings
from varptq.models.texts import MAX_CHARACTERS
from varptq.web.loaded import About, class_choices
from varptq.web.runbar import Updates
from varptq.web.studio import MAX_TOP_K, checked_here, whole

# Shown below the box.
EXAMPLES = 4
OWN_SIZE = ""


@dataclass(frozen=True)
class Wish:
    """A class and a text as a page sent them; a model takes what it understands. `size` is a name,
    or empty for the model's own."""

    name: str
    prompt: str
    negative: str
    size: str

    @classmethod
    def of(cls, name: object, prompt: object, negative: object, size: object) -> Wish:
        return cls(*(str(value or "").strip() for value in (name, prompt, negative, size)))

    def to(self, pipe: Pipeline) -> str:
        """What this model is asked for, "" for nothing."""
        return self.title(pipe.var.READS_TEXTS)

    def title(self, texts: bool) -> str:
        return self.prompt if texts else self.name

    def against(self, pipe: Pipeline) -> str | None:
        return self.negative or None if pipe.var.READS_TEXTS else None

    def sized(self, pipe: Pipeline) -> Pipeline:
        return pipe.sized(self.size_of(pipe))

    def size_of(self, pipe: Pipeline) -> str | None:
        """The size, for a model of several: the one beside it may have a single one."""
        return self.size or None if pipe.var.sizes() else None

    def prompts(self, pipe: Pipeline, count: int) -> Prompts:
        """The same `count` times. Raises `InputError` as `Pipeline.prompts` does, and for none."""
        if pipe.var.READS_TEXTS and not self.prompt:
            raise InputError("prompt: empty; say what to draw")
        return pipe.prompts([self.to(pipe)] * count, self.against(pipe))


class Asking:
    """The controls of a `Wish`, built where it is made. `tab` begins their ids."""

    def __init__(self, tab: str, known: About, *, classes: bool = True, own: str) -> None:
        self.classes = classes
        self.name = gr.Dropdown(
            class_choices(known),
            label="Class",
            info="Type to search; a name or an id",
            allow_custom_value=True,
            visible=classes and not known.texts,
            elem_id=f"{tab}-class",
        )
        examples = _examples([known])
        self.suggested = gr.State(examples[0][0] if classes else "")
        with gr.Column(visible=known.texts, elem_classes="asking") as self.texts:
            self.prompt = gr.Textbox(
                examples[0][0] if classes else "",
                label="Prompt",
                info=None if classes else "May be empty, unless the task is to change something",
                lines=2,
                max_lines=6,
                max_length=MAX_CHARACTERS,
                elem_id=f"{tab}-prompt",
            )
            self.examples = gr.Dataset(
                components=[gr.Textbox(visible=False)],
                samples=examples,
                label="Examples",
                elem_id=f"{tab}-examples",
            )
            self.negative = gr.Textbox(
                label="Stay away from",
                max_lines=3,
                max_length=MAX_CHARACTERS,
                elem_id=f"{tab}-negative",
            )
        self.size = checked_here(
            gr.Dropdown(
                [(own, OWN_SIZE), *known.sizes],
                value=OWN_SIZE,
                label="Size",
                info="Width x height",
                visible=bool(known.sizes),
                elem_id=f"{tab}-size",
            )
        )
        self.own = own
        self.examples.click(
            lambda row: row[0],
            self.examples,
            self.prompt,
            api_visibility="private",
            show_progress="hidden",
        )

    @property
    def inputs(self) -> list[Any]:
        """What `Wish.of` takes, in its order."""
        return [self.name, self.prompt, self.negative, self.size]

    @property
    def typed(self) -> list[Any]:
        """The text in the box, and the one that was put there."""
        return [self.prompt, self.suggested]

    @property
    def outputs(self) -> list[Any]:
        return [self.name, self.texts, self.examples, self.size, *self.typed]

    def updates(self, models: Sequence[About], *typed: Any) -> Updates:
        """Of the controls, for the models that are chosen. typed: the values of `typed`, where a
        text that nobody has changed gives way to one of the chosen model's."""
        sizes = models[0].sizes
        choices = [(self.own, OWN_SIZE), *sizes]
        return {
            **self.shown(models, *typed),
            self.size: gr.update(choices=choices, value=OWN_SIZE, visible=bool(sizes)),
            self.name: self._classes(models, fresh=True),
        }

    def shown(self, models: Sequence[About], *typed: Any) -> Updates:
        """The same where the first model is the one before: what was chosen for it stays."""
        texts, examples = any(known.texts for known in models), _examples(models)
        first, fresh = examples[0][0], {}
        if texts and typed and typed[0] == typed[1] != first:
            fresh = dict.fromkeys(self.typed, first)
        return {
            **fresh,
            self.texts: gr.update(visible=texts),
            self.examples: gr.Dataset(samples=examples),
            self.name: self._classes(models, fresh=models[0].texts),
        }

    def _classes(self, models: Sequence[About], *, fresh: bool) -> Any:
        knowing = [known for known in models if not known.texts]
        if not knowing:
            return gr.update(visible=False)
        names = class_choices(knowing[0])
        changed: dict[str, Any] = {"choices": names, "value": names[0]} if fresh else {}
        return gr.update(visible=True, **changed) if self.classes else gr.update(**changed)


class Sampling:
    """The sliders of `SamplingSettings`, built where it is made. guided: whether guidance is
    shown."""

    def __init__(self, known: About, *, guided: bool = True) -> None:
        own = known.sampling
        self.last = gr.State(own.to_dict())
        self.cfg = gr.Slider(
            0, 10, value=number(own.cfg), step=0.1, label="Guidance (cfg)", visible=guided
        )
        self.tau = gr.Slider(0.05, 2, value=number(own.tau), step=0.05, label="Divisor (tau)")
        self.top_k = gr.Slider(0, MAX_TOP_K, value=own.top_k, step=1, label="Top-k, 0 for all")
        self.top_p = gr.Slider(0, 1, value=own.top_p, step=0.01, label="Top-p, 1 for all")

    @property
    def inputs(self) -> list[Any]:
        """What `settings` takes, in its order."""
        return [self.cfg, self.tau, self.top_k, self.top_p]

    @property
    def outputs(self) -> list[Any]:
        return [self.last, *self.inputs]

    def updates(self, last: Any, known: About) -> Updates:
        """The model's own settings, unless those of the last one were the same."""
        own = known.sampling
        if last == own.to_dict():
            return {}
        values = {self.cfg: own.cfg, self.tau: own.tau, self.top_k: own.top_k}
        fresh = {slider: number(value) for slider, value in values.items()}
        return {self.last: own.to_dict(), **fresh, self.top_p: own.top_p}


class PromptList:
    """What images are drawn for where no single one is asked for: texts, one a line, or a file of
    them, built where it is made. `tab` begins their ids."""

    def __init__(self, tab: str, known: About) -> None:
        with gr.Column(visible=known.texts, elem_classes="asking") as self.all:
            self.typed = gr.Textbox(
                label="Prompts to calibrate on, one a line",
                info=_otherwise(known),
                lines=3,
                max_lines=8,
                elem_id=f"{tab}-prompts",
            )
            self.file = gr.File(
                label="Or a file (.txt, .jsonl, .json, features)",
                file_types=[".txt", ".jsonl", ".json", ".safetensors", ".npz"],
                height=120,
                elem_id=f"{tab}-prompt-file",
            )

    @property
    def inputs(self) -> list[Any]:
        """What `files.prompts` takes."""
        return [self.file, self.typed]

    @property
    def outputs(self) -> list[Any]:
        return [self.all, self.typed]

    def updates(self, known: About) -> Updates:
        """Of the controls, for the model that is chosen."""
        return {
            self.all: gr.update(visible=known.texts),
            self.typed: gr.update(info=_otherwise(known)),
        }


def _own_texts(known: About) -> tuple[str, ...]:
    """What a model that reads texts draws for where nobody says what: as `Pipeline.pool`."""
    return known.names or bundled_prompts()


def _otherwise(known: About) -> str:
    whose = "the model" if known.names else "varptq"
    return f"Empty for the {len(_own_texts(known))} that come with {whose}"


def _examples(models: Sequence[About]) -> list[list[str]]:
    """Texts that the first model which reads any comes with, or the package."""
    reading = next((known for known in models if known.texts), None)
    own = bundled_prompts() if reading is None else _own_texts(reading)
    return [[text] for text in own[:EXAMPLES]]


def settings(cfg: Any, tau: Any, top_k: object, top_p: Any) -> SamplingSettings:
    """From what a page sent. Raises `InputError` or `ConfigError`."""
    return SamplingSettings(
        cfg=cfg, tau=tau, top_k=whole("top-k", top_k, 0, MAX_TOP_K), top_p=top_p
    )


def number(value: PerScale | None) -> float:
    """Where a slider begins: at the last of several, one per scale."""
    assert value is not None
    return value[-1] if isinstance(value, tuple) else value
