"""Where `varptq evaluate` puts its results, and the samples in another form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varptq.cli.asked import Asked
    from varptq.cli.compared import Models
    from varptq.evaluate.evaluate import Subject
    from varptq.models.pipeline import Pipeline

METRICS_NAME, REPORT_NAME = "metrics.json", "report.html"
# Of the forms, those that `evaluate.layouts` knows.
LAYOUTS = {"geneval", "imagereward", "mjhq"}


class Export(StrEnum):
    """Another form of the samples."""

    npz = "npz"
    png = "png"
    geneval = "geneval"
    imagereward = "imagereward"
    mjhq = "mjhq"


@dataclass(frozen=True)
class Exported:
    """Where results go, and in which form samples are written besides. said: what is known of every
    prompt of the pool."""

    form: Export | None
    out: Path
    said: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(
        cls, form: Export | None, out: Path, models: Models, asked: Asked, count: int
    ) -> Exported:
        """Raises `InputError` for a form that these prompts do not fit."""
        if form not in LAYOUTS:
            return cls(form, out)
        from varptq.evaluate.layouts import check_layout
        from varptq.models.prompt_files import PROMPT

        pool = models.pipe.pool()
        said = asked.file.records if asked.file else [{PROMPT: t} for t in pool.titles()]
        check_layout(form, said, count)
        return cls(form, out, said)

    def check(self, models: Models) -> None:
        """Raise `OutputError` now for what `write` would refuse after sampling."""
        from varptq.evaluate.evaluate import kind
        from varptq.evaluate.layouts import layout_folder
        from varptq.evaluate.sampling import exported_folder
        from varptq.files import check_file

        files = [self.out / METRICS_NAME, self.out / REPORT_NAME]
        for pipe in filter(None, (models.pipe, models.float_pipe)):
            if self.form is Export.npz:
                files.append((self.out / kind(pipe)).with_suffix(".npz"))
            elif self.form is Export.png:
                exported_folder(self.out / kind(pipe)).check()
            elif self.form is not None:
                layout_folder(self._place(pipe)).check()
        for file in files:
            check_file(file)

    def write_all(self, subject: Subject, beside: Subject | None) -> dict[str, Any]:
        """The samples of both models; returns an empty document."""
        for one in (subject, *([beside] if beside else [])):
            self.write(one)
        return {"warnings": []}

    def places(self, models: Models) -> list[str]:
        """Where samples are exported to, for people."""
        from varptq.evaluate.evaluate import kind

        pipes = filter(None, (models.pipe, models.float_pipe))
        if self.form in LAYOUTS:
            return [f"{self._place(pipe)}/" for pipe in pipes]
        end = ".npz" if self.form is Export.npz else "/"
        return [f"{self.out / kind(pipe)}{end}" for pipe in pipes]

    def write(self, one: Subject) -> None:
        """The samples of a model in the form that was asked for."""
        from varptq.evaluate.evaluate import kind
        from varptq.evaluate.layouts import export_layout

        place = self.out / kind(one.pipe)
        if self.form is Export.npz:
            one.samples.export_npz(place.with_suffix(".npz"))
        elif self.form is Export.png:
            one.samples.export_png(place)
        elif self.form is not None:
            export_layout(one.samples, self._place(one.pipe), self.form, self.said)

    def _place(self, pipe: Pipeline) -> Path:
        from varptq.evaluate.evaluate import kind

        return self.out / f"{kind(pipe)}-{self.form}"
