"""One set of sampling defaults: in Python, on the command line and in the studio."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import varptq
from varptq.cli import edit as edit_verb
from varptq.cli import evaluate as evaluate_verb
from varptq.cli import generate as generate_verb
from varptq.cli import options
from varptq.editing import edit
from varptq.errors import InputError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.generate import DEFAULT_BATCH, generate
from varptq.models.reading import guided_logits
from varptq.models.sampling import SamplingSettings
from varptq.models.sampling_defaults import CFG, TOP_K, TOP_P

NAMES = ("cfg", "top_k", "top_p")
CALLS = (generate, edit, token_fidelity)
VERBS = (generate_verb.command, edit_verb.command, evaluate_verb.command)


@pytest.mark.parametrize("call", [*CALLS, *VERBS], ids=lambda call: call.__module__)
def test_a_call_draws_as_the_settings_say(call: Callable[..., Any]) -> None:
    parameters, settings = inspect.signature(call).parameters, SamplingSettings()
    assert all(parameters[name].default == getattr(settings, name) for name in NAMES)


def test_what_is_not_said_is_the_models_own() -> None:
    pipe = varptq.build_model("demo")
    own = SamplingSettings(cfg=CFG, tau=1.0, top_k=TOP_K, top_p=TOP_P)
    assert pipe.filled() == own and pipe.filled(SamplingSettings(top_k=3)).top_k == 3
    plan = pipe.plan(SamplingSettings(cfg=(0, 0, 1, 2, 3, 4.5), tau=0.5))
    assert plan.strengths == (0, 0, 1, 2, 3, 4.5) and plan.taus == (0.5,) * 6 and plan.is_guided
    assert not pipe.plan(SamplingSettings(cfg=0)).is_guided
    with pytest.raises(InputError, match="cfg: 2 values, expected one for all scales or 6"):
        varptq.generate(pipe, ["ship"], cfg=[1, 2])
    with pytest.raises(InputError, match="tau: 2 values, expected one for all scales or 6"):
        varptq.generate(pipe, ["ship"], tau=[1, 2])


@pytest.mark.slow
def test_tau_divides_the_logits_before_guidance_and_filters() -> None:
    pipe, labels = varptq.build_model("demo", seed=2), torch.tensor([1, 3])
    tokens = varptq.generate(pipe, labels, seed=0, decode=False).tokens
    for (_, plain), (_, found) in zip(
        guided_logits(pipe, labels, tokens, 2.0),
        guided_logits(pipe, labels, tokens, 2.0, (0.5, 1, 1, 1, 1, 0.25)),
        strict=True,
    ):
        factor = {1: 2.0, 64: 4.0}.get(plain.shape[1], 1.0)
        torch.testing.assert_close(found, plain * factor)
    seen: list[torch.Tensor] = []
    varptq.generate(
        pipe, labels, cfg=2.0, tau=0.5, top_k=0, top_p=0, forced=tokens, decode=False,
        on_scale=lambda event: seen.append(event.logits_BlV),
    )  # fmt: skip
    expected = [logits for _, logits in guided_logits(pipe, labels, tokens, 2.0, 0.5)]
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_command_line_takes_as_many_images_at_a_time_as_the_calls() -> None:
    """Written down twice, so that --help needs no torch."""
    assert options.BATCH_SIZE == DEFAULT_BATCH
