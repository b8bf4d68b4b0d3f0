"""The model that `varptq evaluate` measures and the float model it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq.cli.model_choice import ModelChoice
from varptq.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from varptq.cli.asked import Asked
    from varptq.models.pipeline import Pipeline


@dataclass(frozen=True)
class Models:
    """The model to measure and its float model; `warning` if that may be the wrong one."""

    pipe: Pipeline
    float_pipe: Pipeline | None = None
    warning: str | None = None

    def drawing(self, asked: Asked, size: str | None) -> Models:
        """Both at a size and with the prompts that were asked for; the float model without a size
        is at that of the other."""
        pipe = asked.drawing(self.pipe, size)
        other = self.float_pipe
        if other is not None:
            other = replace(other, encoder=pipe.encoder, chosen=pipe.chosen)
            other = other if other.scales == pipe.scales else other.over(pipe.scales)
        return replace(self, pipe=pipe, float_pipe=other)


@dataclass(frozen=True)
class Choices:
    """The chosen models. `beside` None: the float model that the artifact names."""

    subject: ModelChoice
    beside: ModelChoice | None

    @classmethod
    def of(
        cls,
        source: str | None,
        against: str | None,
        files: tuple[Path | None, Path | None, str | None],
        **placement: Any,
    ) -> Choices:
        """With an artifact as `source` the other options name the float model; without it they
        name the model to measure. Raises `InputError` if they contradict each other."""
        given = any(option is not None for option in (against, *files))
        if source is None:
            if against is not None:
                raise InputError(
                    f"against {against!r}: no model to measure; give an artifact before it"
                )
            return cls(ModelChoice(None, *files, **placement), None)
        subject = ModelChoice(source, **placement)
        if subject.is_float and given:
            raise InputError(
                f"model {source!r}: a float model, which is compared with nothing; give an "
                "artifact, or leave out --against, --var, --vae and --random"
            )
        beside = ModelChoice(against, *files, **placement) if given else None
        if beside is not None:
            beside.check_float()
            _check_alike(subject, beside)
        return cls(subject, beside)

    def load(self, runtime: str) -> Models:
        pipe = self.subject.load(runtime)
        if self.subject.is_float:
            return Models(pipe)
        if self.beside is None:
            return self._with_own(pipe)
        float_pipe = self.beside.load_float()
        if float_pipe.sources == pipe.sources:
            return Models(pipe, float_pipe)
        doubt = f"model {float_pipe.name!r}: not the weights that the artifact was made from"
        return Models(pipe, float_pipe, doubt)

    def _with_own(self, pipe: Pipeline) -> Models:
        """The float model that the artifact names, if it is on this machine and the same."""
        from varptq.models.presets import PRESETS

        missing = (
            f"model {pipe.name!r}: its float model is not on this machine, so nothing is compared; "
            "give --against, or --var with --vae"
        )
        if pipe.name not in PRESETS:
            return Models(pipe, None, missing)
        try:
            float_pipe = replace(self.subject, source=pipe.name).load_float()
        except CheckpointError:
            return Models(pipe, None, missing)
        return (
            Models(pipe, float_pipe)
            if float_pipe.sources == pipe.sources
            else Models(pipe, None, missing)
        )


def _check_alike(subject: ModelChoice, beside: ModelChoice) -> None:
    """Raise `InputError` for a model of classes and one that reads texts."""
    if (beside.var is None) != (beside.vae is None):
        return  # one file of two, which loading refuses
    (name, texts), (other, other_texts) = subject.about(), beside.about()
    if texts != other_texts:
        kinds = ["reads texts" if reads else "draws classes" for reads in (texts, other_texts)]
        raise InputError(
            f"model {other!r}: {kinds[1]}, and the artifact of {name!r} {kinds[0]}; name the float "
            "model that it was made from"
        )
