"""Teacher-forced reading of given tokens: the pass itself, its guided distributions, and listeners.

Every measure that does not draw images stands on it: calibration, theta, tuning, token fidelity,
sensitivities. Rows are [asked; nothing], the two that guidance needs. Shapes as in `seams.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from varptq.models.pipeline import Pipeline
from varptq.models.sampling import PerScale, SamplingSettings, at_tau, guided

Key = TypeVar("Key")


def read(pipe: Pipeline, prompts: Any, tokens: Tensor) -> Tensor:
    """float32 logits (2B, L, V) of rows [asked; nothing] for given tokens, all scales at once."""
    inputs = pipe.vae.teacher_inputs(tokens.to(pipe.device))
    return pipe.var(pipe.prompts(prompts).guided(), inputs.repeat(2, 1, 1))


def guided_logits(
    pipe: Pipeline,
    prompts: Any,
    tokens: Tensor,
    cfg: PerScale | None = None,
    tau: PerScale | None = None,
    guided_scales: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Float32 logits after tau and guidance per scale and draw, (B, l draws, V), coarse to fine,
    nothing filtered. cfg, tau, guided_scales: as in `SamplingSettings`."""
    plan = pipe.plan(SamplingSettings(cfg=cfg, tau=tau, guided_scales=guided_scales))
    logits_2BLV = read(pipe, prompts, tokens)
    for scale, part in enumerate(pipe.scales.slices()):
        logits = at_tau(logits_2BLV[:, part], plan.taus[scale])
        yield scale, pipe.alphabet.by_draw(guided(logits, plan.strengths[scale]))


def kl_divergence(p: Tensor, q: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """KL(softmax(p) || softmax(q)) in nats over the last axis of logits, (..., V) -> (...) `dtype`.

    Entries that are -inf in p carry no mass and count nothing.
    """
    log_p, log_q = (logits.to(dtype).log_softmax(-1) for logits in (p, q))
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -torch.inf, 0.0).sum(-1)


@contextmanager
def listening(
    modules: Mapping[Key, nn.Module], tell: Callable[..., None], *, output: bool = False
) -> Iterator[None]:
    """While it lasts, `tell(key, *arguments)` hears what each module is called with, or with
    `output` `tell(key, result, *arguments)` what it gives. Seams are called with their spans."""

    def before(key: Key) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: tell(key, *arguments)

    def after(key: Key) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, arguments, result: tell(key, result, *arguments)

    with ExitStack() as stack:
        for key, module in modules.items():
            if output:
                handle = module.register_forward_hook(after(key))
            else:
                handle = module.register_forward_pre_hook(before(key))
            stack.callback(handle.remove)
        yield
