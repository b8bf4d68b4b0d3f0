"""One set of sampling defaults: in Python, on the command line and in the studio."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from varptq.cli import edit as edit_verb
from varptq.cli import evaluate as evaluate_verb
from varptq.cli import generate as generate_verb
from varptq.cli import options
from varptq.editing import edit
from varptq.evaluate.tokens import token_fidelity
from varptq.models.generate import DEFAULT_BATCH, generate
from varptq.models.sampling import SamplingSettings

NAMES = ("cfg", "top_k", "top_p")
CALLS = (generate, edit, token_fidelity)
VERBS = (generate_verb.command, edit_verb.command, evaluate_verb.command)


@pytest.mark.parametrize("call", [*CALLS, *VERBS], ids=lambda call: call.__module__)
def test_a_call_draws_as_the_settings_say(call: Callable[..., Any]) -> None:
    parameters, settings = inspect.signature(call).parameters, SamplingSettings()
    for name in NAMES:
        default = parameters[name].default
        # None: without a class there is no guidance (docs/editing.md).
        assert default == getattr(settings, name) or (name == "cfg" and default is None)


def test_the_command_line_takes_as_many_images_at_a_time_as_the_calls() -> None:
    """Written down twice, so that --help needs no torch."""
    assert options.BATCH_SIZE == DEFAULT_BATCH
