"""`varptq generate`: images of given classes or texts from a float model or an artifact, as PNG
files.

A folder gets one PNG per image, a grid of them all and `tokens.npz` (tokens (B, L) or (B, L, draws)
int64, and labels (B,) int64, or texts and lengths); a name that ends in .png gets the grid alone.
Image i draws from (seed, i), so the images of two models with the same prompts and seed are
comparable.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq import readable
from varptq.cli import common, options
from varptq.cli.asked import Asked, read_size
from varptq.cli.model_choice import ModelChoice
from varptq.errors import OutputError
from varptq.models.sampling_defaults import MAX_IMAGES

if TYPE_CHECKING:
    from varptq.models.generate import Output
    from varptq.models.pipeline import Pipeline
    from varptq.models.prompts import Prompts
    from varptq.models.sampling import SamplingSettings

GRID_NAME, TOKENS_NAME = "grid.png", "tokens.npz"
Count = Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Images per class or text.")]


def command(
    out: Annotated[Path, typer.Option(help="Folder for all files, or NAME.png for the grid.")],
    source: options.Source = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names or ids, e.g. cat,3,ship.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A text to draw; may be repeated.")
    ] = None,
    prompts: options.PromptFile = None,
    negative: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to stay away from, for all prompts.")
    ] = None,
    encoder: options.Encoder = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    class_names: options.ClassNames = None,
    count: Count = 1,
    seed: options.Seed = 0,
    cfg: options.Guidance = None,
    tau: options.Tau = None,
    guided_scales: options.GuidedScales = None,
    guide_at: options.GuideAt = "0",
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    size: options.Size = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    more_smooth: Annotated[
        bool, typer.Option("--more-smooth", help="Feed mixtures of embeddings; smoother images.")
    ] = False,
    batch_size: options.BatchSize = options.BATCH_SIZE,
    runtime: options.Runtime = options.RUNTIME,
    download: options.Download = False,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Draw images of the given classes or texts from a float model or an artifact."""
    from varptq.models.sampling import SamplingSettings

    guidance: dict[str, Any] = {"cfg": cfg, "tau": tau, "guided_scales": guided_scales}
    filters: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    settings = SamplingSettings(more_smooth=more_smooth, **guidance, **filters)
    asked = Asked.of(classes, prompt, prompts, negative, encoder, download=download)
    asked.check_any()
    choice = ModelChoice(source, var, vae, random, download, device, dtype, class_names)
    asked.check(choice)
    pipe = asked.prepared(choice.load(runtime)).sized(read_size(size))
    # Refused before texts are encoded.
    pipe.plan(settings, guide_at, negative=negative is not None)
    document = draw(
        pipe, asked.prompts(pipe, count), settings, guide_at, seed, batch_size, out, force
    )
    if json:
        common.print_json(document)
    else:
        common.print_rows("varptq generate", rows(document, out))


def draw(
    pipe: Pipeline,
    asked: Prompts,
    settings: SamplingSettings,
    guide_at: tuple[int, ...],
    seed: int,
    batch_size: int,
    out: Path,
    force: bool,
) -> dict[str, Any]:
    """Draw, write the files, and say what was done as plain JSON values."""
    from varptq.models.generate import generate
    from varptq.progress import RichProgress

    files = Files.plan(out, asked.titles())
    with files.claimed(force):
        started = time.monotonic()
        with RichProgress() as progress:
            sampling = pipe.filled(settings).to_dict()
            output = generate(
                pipe,
                asked,
                seed=seed,
                guide_at=guide_at,
                batch_size=batch_size,
                progress=progress,
                **sampling,
            )
        duration = time.monotonic() - started
        files.write(output, asked)
    return {
        "model": pipe.name,
        "runtime": getattr(pipe, "runtime", "float"),
        "seed": seed,
        "size": list(pipe.vae.image_size),
        "sampling": {**sampling, "guide_at": list(guide_at)},
        "seconds": duration,
        **files.describe(asked),
    }


@dataclass(frozen=True)
class Files:
    """Paths of the results. If only the grid is wanted, `images` is empty and `tokens` None."""

    grid: Path
    images: tuple[Path, ...] = ()
    tokens: Path | None = None

    @classmethod
    def plan(cls, out: Path, titles: Sequence[str]) -> Files:
        if out.suffix.lower() == ".png":
            return cls(out)
        from varptq.pictures import slug

        width = max(4, len(str(len(titles) - 1)))
        images = tuple(out / f"{i:0{width}}-{slug(title)}.png" for i, title in enumerate(titles))
        return cls(out / GRID_NAME, images, out / TOKENS_NAME)

    @contextmanager
    def claimed(self, force: bool) -> Iterator[None]:
        """Check that the files can be written before the time is spent, and keep other runs from
        these names until the block ends. Raises `OutputError`."""
        from varptq.files import PREFIX, check_file
        from varptq.locks import HeldError, Lock

        wanted = [self.grid, *self.images, *([self.tokens] if self.tokens else [])]
        check_file(self.grid)
        # All files of a run are in one folder, and the grid is one of them.
        key = hashlib.sha256(os.fsencode(self.grid.name)).hexdigest()[:16]
        try:
            with Lock(self.grid.with_name(f"{PREFIX}{key}.lock")):
                taken = [path for path in wanted if path.exists()]
                if taken and not force:
                    raise OutputError(f"{taken[0]}: exists; choose another place or give --force")
                yield
        except HeldError as error:
            raise OutputError(
                f"{self.grid}: process {error.owner} is writing it; wait for it or choose another "
                "place"
            ) from None

    def write(self, output: Output, asked: Prompts) -> None:
        import numpy as np

        from varptq.files import write_atomic
        from varptq.pictures import gallery, to_pixels, write_png

        assert output.images is not None
        pixels = to_pixels(output.images)
        for path, image in zip(self.images, pixels, strict=False):
            write_png(path, image)
        if self.tokens is not None:
            arrays: dict[str, Any] = {"tokens": output.tokens.cpu().numpy(), **asked.arrays()}
            write_atomic(self.tokens, lambda file: np.savez(file, **arrays))
        write_png(self.grid, gallery(pixels, asked.titles()))

    def describe(self, asked: Prompts) -> dict[str, Any]:
        facts = (
            fact if isinstance(fact, dict) else {"label": fact, "class": title}
            for fact, title in zip(asked.facts(), asked.titles(), strict=True)
        )
        images = [
            {"file": str(path), **fact} for path, fact in zip(self.images, facts, strict=False)
        ]
        tokens = str(self.tokens) if self.tokens else None
        return {
            "num_images": len(asked),
            "grid": str(self.grid),
            "tokens": tokens,
            "images": images,
        }


def rows(document: dict[str, Any], out: Path) -> list[tuple[str, str]]:
    count, duration = document["num_images"], document["seconds"]
    speed = f"{count} in {readable.seconds(duration)}, {count / duration:.2f} a second"
    return [
        ("model", f"{document['model']}, {document['runtime']}"),
        ("images", speed),
        ("seed", str(document["seed"])),
        ("written", str(out)),
    ]
