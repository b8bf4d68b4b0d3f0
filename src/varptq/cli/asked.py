"""What a command line asks a model for: classes of one that knows them, texts of one that reads
them, and the text encoder between. Files are read before a model is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq.cli import common
from varptq.errors import InputError
from varptq.progress import Progress, silent

if TYPE_CHECKING:
    from varptq.cli.model_choice import ModelChoice
    from varptq.models.pipeline import Pipeline
    from varptq.models.prompt_files import PromptFile
    from varptq.models.prompts import Prompts


@dataclass(frozen=True)
class Asked:
    """Options as they were given. `file` is what --prompts names, read from `path`; `option`, how
    classes are given, None where they are not asked for.

    Raises `InputError` for two that name prompts, and for a file that cannot be used."""

    classes: str | None = None
    prompt: tuple[str, ...] = ()
    file: PromptFile | None = None
    path: Path | None = None
    negative: str | None = None
    encoder: str | None = None
    download: bool = False
    option: str | None = "classes"

    @classmethod
    def of(
        cls,
        classes: str | None = None,
        prompt: list[str] | None = None,
        prompts: Path | None = None,
        negative: str | None = None,
        encoder: str | None = None,
        *,
        download: bool = False,
        option: str | None = "classes",
    ) -> Asked:
        if (classes is not None) + bool(prompt) + (prompts is not None) > 1:
            texts = "--prompt and --prompts" if option == "classes" else "--prompt"
            raise InputError(f"prompts: give one of --{option}, {texts}")
        from varptq.models.prompt_files import prompt_file

        file = None if prompts is None else prompt_file(prompts)
        texts = tuple(prompt or ())
        return cls(classes, texts, file, prompts, negative, encoder, download, option)

    def check_any(self) -> None:
        """Raise `InputError` where nothing is asked for."""
        if self.classes is None and not self.prompt and self.file is None:
            raise InputError(
                "prompts: none given; name classes with '--classes', or give texts with '--prompt' "
                "or '--prompts'"
            )

    def check(self, choice: ModelChoice) -> None:
        """Raise `InputError` for options that are for another kind of model, before it is
        loaded."""
        name, reads_texts = choice.about()
        if reads_texts:
            if self.classes is not None:
                raise InputError(
                    f"{self.option} {self.classes!r}: model {name!r} reads texts; give --prompt"
                )
            return
        given = {
            "prompt": next(iter(self.prompt), None),
            "prompts": None if self.path is None else self.path.name,
            "negative": self.negative,
            "encoder": self.encoder,
        }
        for option, value in given.items():
            if value:
                instead = f", and name what to draw with --{self.option}" if self.option else ""
                raise InputError(
                    f"{option} {value!r:.60}: model {name!r} reads no texts; leave out --{option}"
                    f"{instead}"
                )

    def prepared(self, pipe: Pipeline, progress: Progress = silent) -> Pipeline:
        """The model with the text encoder that was named."""
        if self.encoder is not None:
            from varptq.models.text_encoder import T5Encoder

            pipe.encoder = T5Encoder(
                self.encoder, download=self.download, device=pipe.device, progress=progress
            )
        return pipe

    def drawing(self, pipe: Pipeline, size: str | None, progress: Progress = silent) -> Pipeline:
        """The model at a size, with the prompts of --prompts as its pool."""
        pipe = self.prepared(pipe, progress).sized(read_size(size))
        return pipe if self.file is None else pipe.drawing_for(self.file.prompts)

    def prompts(self, pipe: Pipeline, count: int) -> Prompts:
        """Every prompt `count` times, one after the other."""
        if self.classes is not None:
            values: Any = common.parse_classes(self.classes)
        else:
            values = self.file.prompts if self.file is not None else list(self.prompt)
        import torch

        asked = pipe.prompts(values, self.against())
        rows = torch.arange(len(asked), dtype=torch.int64, device="cpu")
        return asked[rows.repeat_interleave(count)]

    def one(self) -> Any:
        """The class or the text, where one is given."""
        return self.classes if self.classes is not None else next(iter(self.prompt), None)

    def against(self) -> Any:
        """The negative prompt: a string, or features of a file."""
        from varptq.models.prompt_files import FEATURE_SUFFIXES, load_features

        if self.negative is None or Path(self.negative).suffix not in FEATURE_SUFFIXES:
            return self.negative
        return load_features(self.negative)


def read_size(text: str | None) -> Any:
    """ "768x1024" -> (768, 1024), height first; anything else is a name of the family's."""
    if text is None:
        return None
    height, cross, width = text.lower().partition("x")
    if cross and height.isdecimal() and width.isdecimal():
        return int(height), int(width)
    return text
