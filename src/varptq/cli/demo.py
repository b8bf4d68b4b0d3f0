"""`varptq demo`: the whole workflow on a bundled model, in a few minutes on two CPU cores.

Quantize with the full method, save, reload the artifact in a new process, sample the same classes
or texts from the same seeds with both models, compare. Written to --out: `comparison.png`,
`summary.txt` and `artifact/`. These three are replaced if they exist; other files there do not
change.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq import readable
from varptq.cli import common, options
from varptq.cli import generate as generate_verb
from varptq.cli import quantize as quantize_verb
from varptq.cli import quantized as quantized_verb
from varptq.errors import VarptqError
from varptq.models.sampling_defaults import MAX_IMAGES, TOP_P

if TYPE_CHECKING:
    from torch import Tensor

    from varptq.evaluate.tokens import TokenFidelity
    from varptq.models.generate import Output
    from varptq.models.pipeline import Pipeline
    from varptq.models.prompts import Prompts
    from varptq.pictures import Pixels

# As many as there are classes; of a longer list, this many that are spread over it.
MAX_PROMPTS = 10


@dataclass(frozen=True)
class Recipe:
    """All settings of the demo. Calibration is as long as five minutes on two cores allow.

    images_per_class: or per text. cfg, top_k, top_p: None is the model's own."""

    model: str = "demo"
    config: str = "w4a4+groups"
    method: str = "sas"
    samples: int = 100
    steps: int = 300
    calibration_seed: int = 0
    # Not the seed of calibration: the compared images are held out.
    sampling_seed: int = 1
    images_per_class: int = 5
    cfg: float | None = 4.0
    top_k: int | None = 100
    top_p: float | None = TOP_P

    def filled(self, pipe: Pipeline) -> Recipe:
        """The same with the model's own value for each that is None."""
        from varptq.models.sampling import SamplingSettings

        own = pipe.filled(SamplingSettings(cfg=self.cfg, top_k=self.top_k, top_p=self.top_p))
        assert isinstance(own.cfg, float)
        return replace(self, cfg=own.cfg, top_k=own.top_k, top_p=own.top_p)


OF_CLASSES = Recipe()
OF_TEXTS = Recipe(model="demo-text", cfg=None, top_k=None, top_p=None)
ImageCount = Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Images per class or text.")]


def command(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; default: out/ and the name of the model."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="The bundled text-to-image model instead.")
    ] = False,
    samples: Annotated[int, typer.Option(help="Calibration images.")] = Recipe.samples,
    steps: Annotated[int, typer.Option(help="Reconstruction steps per unit.")] = Recipe.steps,
    images: ImageCount = Recipe.images_per_class,
    json: options.Json = False,
) -> None:
    """Quantize a bundled model to 4 bits and compare its images with the original's."""
    recipe = OF_TEXTS if text else OF_CLASSES
    out = out or Path("out", recipe.model)
    recipe = replace(recipe, samples=samples, steps=steps, images_per_class=images)
    result = run(recipe, out)
    document = result.to_dict()
    write_results(result, document, out)
    if json:
        common.print_json(document)
    else:
        common.print_rows("varptq demo", rows(document))
        typer.echo(f"written: {out}/comparison.png, {out}/summary.txt, {out}/artifact/")


@dataclass
class Clock:
    """Seconds per stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


@dataclass(frozen=True)
class Result:
    """What `run` found. Images (B, H, W, 3) uint8, title by title, `images_per_class` of each.
    titles: classes or texts. own_cfg: the guidance that distributions are compared at."""

    recipe: Recipe
    titles: tuple[str, ...]
    float_pixels: Pixels
    quant_pixels: Pixels
    sizes: dict[str, Any]
    quantization: dict[str, Any]
    agreement: float
    psnr: float
    fidelity: TokenFidelity
    own_cfg: float
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the images; `psnr` is null where all images are equal."""
        return {
            "recipe": asdict(self.recipe),
            "sizes": self.sizes,
            "theta": self.quantization["theta"],
            "units": self.quantization["units"],
            "token_agreement": self.agreement,
            "psnr": self.psnr if math.isfinite(self.psnr) else None,
            "fidelity": self.fidelity.to_dict(),
            "fidelity_cfg": self.own_cfg,
            "seconds": self.seconds,
        }


def run(recipe: Recipe, out: Path) -> Result:
    """Quantize, save to `out`/artifact, sample with both models, compare."""
    from varptq.evaluate.paired import psnr, token_agreement
    from varptq.evaluate.tokens import token_fidelity
    from varptq.models.pipeline import load_model
    from varptq.models.prompts import spread
    from varptq.pictures import to_pixels
    from varptq.runtime import load

    artifact, clock = out / "artifact", Clock()
    pipe = load_model(recipe.model)
    recipe = recipe.filled(pipe)
    quantization = quantize(recipe, pipe, artifact, clock)
    pool = pipe.pool()
    rows = spread(len(pool), min(MAX_PROMPTS, len(pool)))
    titles = tuple(pool[rows].titles())
    asked = pool[rows.repeat_interleave(recipe.images_per_class)]
    with clock.stage("sample the float model"):
        output = sample_float(recipe, pipe, asked)
    assert output.images is not None
    with clock.stage("reload and sample in a new process"):
        words = asking(titles, pipe.var.READS_TEXTS)
        quant_tokens, quant_pixels = sample_in_new_process(recipe, words, artifact)
    with clock.stage("compare next-token distributions"):
        # At the default guidance, as in the paper: the stronger one of the pictures amplifies
        # errors.
        fidelity = token_fidelity(pipe, load(artifact), asked, output.tokens)
    own_cfg = pipe.filled().cfg
    assert isinstance(own_cfg, float)
    pixels = to_pixels(output.images)
    return Result(
        recipe,
        titles,
        pixels,
        quant_pixels,
        quantization["sizes"],
        quantization,
        token_agreement(output.tokens, quant_tokens),
        psnr(pixels, quant_pixels),
        fidelity,
        own_cfg,
        clock.seconds,
    )


def quantize(recipe: Recipe, pipe: Pipeline, artifact: Path, clock: Clock) -> dict[str, Any]:
    """Calibrate, quantize and save; returns the summary that `varptq quantize` prints."""
    from varptq.artifact import save
    from varptq.calibrate.config import CalibrationConfig
    from varptq.calibrate.quantize import quantize
    from varptq.progress import RichProgress
    from varptq.quant.config import QuantConfig

    calibration = CalibrationConfig(num_samples=recipe.samples, steps=recipe.steps)
    quantize_verb.check_output(artifact, force=True)
    with clock.stage("calibrate and quantize"), RichProgress() as progress:
        quantized = quantize(
            pipe,
            QuantConfig.preset(recipe.config),
            method=recipe.method,
            calibration=calibration,
            seed=recipe.calibration_seed,
            progress=progress,
        )
    with clock.stage("save the artifact"):
        save(quantized, artifact, force=True)
    return quantized_verb.summary(quantized, artifact, clock.seconds["calibrate and quantize"])


def sample_float(recipe: Recipe, pipe: Pipeline, asked: Prompts) -> Output:
    from varptq.models.generate import generate
    from varptq.progress import RichProgress

    with RichProgress() as progress:
        return generate(
            pipe,
            asked,
            seed=recipe.sampling_seed,
            cfg=recipe.cfg,
            top_k=recipe.top_k,
            top_p=recipe.top_p,
            progress=progress,
        )


def asking(titles: tuple[str, ...], texts: bool) -> list[str]:
    """The options of `varptq generate` that ask for these texts or classes."""
    if texts:
        return [f"--prompt={title}" for title in titles]
    return [f"--classes={','.join(titles)}"]


def sample_in_new_process(
    recipe: Recipe, asked: list[str], artifact: Path
) -> tuple[Tensor, Pixels]:
    """Tokens (B, L) or (B, L, draws) and images of the artifact, from `varptq generate` as a user
    would run it."""
    import numpy as np
    import torch
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="varptq-demo-") as folder:
        options = {
            "count": recipe.images_per_class,
            "seed": recipe.sampling_seed,
            "cfg": recipe.cfg,
            "top-k": recipe.top_k,
            "top-p": recipe.top_p,
            "out": folder,
        }
        words = [*asked, *(f"--{name}={value}" for name, value in options.items())]
        call = [sys.executable, "-m", "varptq", "generate", os.fspath(artifact), *words]
        code = subprocess.run(call, stdout=subprocess.DEVNULL, check=False).returncode
        if code:
            raise VarptqError(f"demo: sampling in a new process failed with exit code {code}")
        tokens = torch.from_numpy(np.load(Path(folder, generate_verb.TOKENS_NAME))["tokens"])
        files = sorted(Path(folder).glob("[0-9]*.png"))
        return tokens, np.stack([np.asarray(Image.open(file)) for file in files])


def write_results(result: Result, document: dict[str, Any], out: Path) -> None:
    """comparison.png and summary.txt."""
    from varptq.files import write_atomic
    from varptq.pictures import Block, Row, sheet, write_png

    recipe, count = result.recipe, result.recipe.images_per_class
    blocks = []
    for place, name in enumerate(result.titles):
        part = slice(place * count, (place + 1) * count)
        pairs = [(result.float_pixels, "float"), (result.quant_pixels, recipe.config.upper())]
        blocks.append(Block([Row(pixels[part], label) for pixels, label in pairs], title=name))
    heading = f"Float above {recipe.config.upper()} ({recipe.method}), same seeds"
    write_png(out / "comparison.png", sheet(blocks, across=2, heading=heading))
    lines = rows(document)
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:{width}}  {value}" for name, value in lines)
    write_atomic(out / "summary.txt", f"varptq demo\n\n{text}\n".encode())


def rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table and summary.txt say."""
    recipe, fidelity = document["recipe"], document["fidelity"]
    psnr = document["psnr"]
    return [
        ("settings", f"{recipe['config']}, {recipe['method']}"),
        ("calibration", f"{recipe['samples']} images, {recipe['steps']} steps per unit"),
        *common.size_rows(document["sizes"]),
        ("theta", common.theta_text(document["theta"])),
        ("units", quantized_verb.units_text(document["units"])),
        (
            "compared",
            f"{fidelity['num_images']} images, cfg {recipe['cfg']:g}, top-k {recipe['top_k']}, "
            f"top-p {recipe['top_p']:g}, seed {recipe['sampling_seed']}",
        ),
        (
            "token agreement",
            f"{document['token_agreement']:.1%} of {fidelity['num_tokens']} tokens",
        ),
        ("PSNR", "identical images" if psnr is None else f"{psnr:.2f} dB"),
        (
            f"KL(float || quantized), cfg {document['fidelity_cfg']:g}",
            f"{fidelity['kl']:.4f} nats per token, same context",
        ),
        ("  on filtered support", f"{fidelity['kl_filtered']:.4f} nats per token"),
        ("  per scale", ", ".join(f"{kl:.4f}" for kl in fidelity["kl_per_scale"])),
        ("same top-1 token", f"{fidelity['top1']:.1%}"),
        *((f"time: {name}", readable.seconds(took)) for name, took in document["seconds"].items()),
    ]
