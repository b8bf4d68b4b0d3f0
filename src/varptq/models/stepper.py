"""The transformer's part of generation: logits scale by scale, with or without the rows that ask
for nothing. Shapes as in seams.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from varptq.models.autoencoder import Autoencoder
from varptq.models.prompts import Prompts
from varptq.models.sampling import LOGITS, DrawPlan, at_tau
from varptq.models.seams import Stage, run_stages, spans_of
from varptq.models.transformer import Transformer

Mix = Callable[[list[Stage]], list[Stage]]


class Rows:
    """Rows that are computed together: what they ask for, and their keys and values. `mix` puts
    guidance into a pass."""

    def __init__(self, var: Transformer, count: int, cache: list[Any], mix: Mix) -> None:
        self.var, self.count, self.cache, self.mix = var, count, cache, mix
        self.condition: Any = None
        self.stages: list[Stage] = []

    def ask(self, condition: Any) -> None:
        """What `Transformer.condition` made of the prompts of these rows."""
        self.condition = condition
        self.stages = self.mix(self.var.stages(condition))

    def step(self, scale: int, inputs_Blc: Tensor | None) -> Tensor:
        """(rows, l, V) float32 logits of `scale`, from its input tokens; those of images stand for
        all their rows, and at scale 0 there are none."""
        spans = spans_of(self.var.scales, scale, scale + 1)
        if inputs_Blc is None:
            x_BlC = self.var.embed_first(self.condition)
        else:
            x_BlC = self.var.embed_inputs(inputs_Blc, spans)
            if self.count > len(inputs_Blc):
                x_BlC = x_BlC.repeat(self.count // len(inputs_Blc), 1, 1)
        return run_stages(self.stages, x_BlC, spans, self.cache)


class Batch:
    """The rows of one batch of images: [asked; nothing] as long as guidance needs the latter, then
    those that were asked for alone, on the keys and values of the first. `kind` makes rows."""

    def __init__(
        self,
        var: Transformer,
        images: int,
        plan: DrawPlan,
        kind: Callable[[Transformer, int, list[Any], Mix], Rows] = Rows,
    ) -> None:
        self._var, self._images, self._kind = var, images, kind
        count = images * (1 + plan.is_guided)

        def mix(stages: list[Stage]) -> list[Stage]:
            return var.mixed(stages, plan.strengths, plan.guide_at) if plan.is_guided else stages

        self.all = kind(var, count, var.new_cache(count), mix)
        self._asked: Rows | None = None

    def asked(self) -> Rows:
        """The rows that were asked for, which go on from where all are."""
        if self._asked is None:
            cache = [cache.first_rows(self._images) for cache in self.all.cache]
            self._asked = self._kind(self._var, self._images, cache, lambda stages: stages)
        return self._asked


class Stepper:
    """Logits of one batch, scale by scale."""

    def __init__(self, vae: Autoencoder, prompts: Prompts, plan: DrawPlan, batch: Batch) -> None:
        self.vae, self.plan, self.prompts, self.batch = vae, plan, prompts, batch
        self.two_rows = plan.is_guided
        self._ask(batch.all, prompts.guided() if self.two_rows else prompts)

    def _ask(self, rows: Rows, prompts: Prompts) -> None:
        self.rows = rows
        rows.ask(rows.var.condition(prompts))

    @property
    def mixes_logits(self) -> bool:
        """Whether the logits are those of two rows in the end."""
        return self.two_rows and LOGITS in self.plan.guide_at

    def logits(self, scale: int, f_hat: Tensor) -> Tensor:
        """(rows, l, V) float32 logits of `scale` divided by tau, given f_hat of the scales before
        it; of the asked rows alone where the logits are not to be mixed."""
        if self.two_rows and not self.plan.is_guided_from(scale):
            self.two_rows = False
            self._ask(self.batch.asked(), self.prompts)
        inputs_Blc = None if scale == 0 else self.vae.next_input(f_hat, scale - 1)
        logits = at_tau(self.rows.step(scale, inputs_Blc), self.plan.taus[scale])
        return logits if self.mixes_logits else logits[: len(f_hat)]

    def guidance(self, scale: int) -> float | None:
        """Strength at `scale`, None where all rows are images."""
        return self.plan.strengths[scale] if self.mixes_logits else None
