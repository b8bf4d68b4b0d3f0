"""Train the text-to-image demo: a bitwise autoencoder, then an Infinity transformer on its bits.

    python examples/train_demo/train_text.py --data CIFAR --out out/train_text [--recipe FILE]

Give the same command again after a stop and it goes on. OUT gets the states of both loops and at
the end vae_demo_text.safetensors and infinity_demo_text.safetensors (the published names, float16,
averaged weights), prompts.txt and record.json; with --network also measures of samples and
samples.png. With --as-it-is nothing is trained: the files are written from the states that are
there. Data: see data.py; prompts: captions.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bits_stage
import data
import loop
import text_judge
import text_stage
import torch
from text_recipe import TextRecipe
from text_stage import NAME
from train import RECORD, add_run_options, half, machine, write

from varptq.errors import ConfigError, VarptqError
from varptq.evaluate.features import FeatureNetwork, load_network
from varptq.evaluate.networks.lpips import Lpips
from varptq.files import write_atomic
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import spread
from varptq.models.state_file import file_sha256, read_state
from varptq.pictures import gallery, write_png
from varptq.progress import Progress, RichProgress

VAE_FILE, INFINITY_FILE = "vae_demo_text.safetensors", "infinity_demo_text.safetensors"
PROMPTS_FILE, SAMPLES_FILE, SHOWN = "prompts.txt", "samples.png", 40
# So many captions of test images are what the model is asked for where nobody asks.
POOL = 200


def run(
    recipe: TextRecipe,
    folder: Path,
    out: Path,
    device: torch.device,
    lpips: Lpips | None,
    start: Sequence[Path],
    *,
    network: FeatureNetwork | None,
    samples: int,
    go_on: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Both stages and the files; the content of record.json."""
    side = recipe.scales.last[0] * recipe.bits.arch().downsampling
    dataset = data.load(folder, out / "images.npz", side)
    identity = {
        "recipe": recipe.to_dict(),
        "images": [len(dataset.train.labels), len(dataset.test.labels)],
        "lpips": lpips is not None,
        "start": [file_sha256(path) for path in start],
    }
    begin = {name: tensor for path in start for name, tensor in read_state(path).items()}
    vae = bits_stage.build(recipe, begin, device)
    first = bits_stage.stage(recipe, vae, dataset.train, device, lpips, _of_bits(identity))
    reached = {first.name: loop.train(first, out / "bits.state.pt", progress, go_on=go_on)}
    vae.eval().requires_grad_(False)
    infinity = text_stage.build(recipe, vae.alphabet.draws, begin, device)
    second = text_stage.stage(recipe, infinity, vae, dataset.train, device, identity)
    reached[second.name] = loop.train(second, out / "infinity.state.pt", progress, go_on=go_on)
    infinity.eval().requires_grad_(False)
    write(half(vae), out / VAE_FILE)
    write(half(infinity), out / INFINITY_FILE)
    write_atomic(out / PROMPTS_FILE, _pool(recipe, dataset).encode())
    measures = bits_stage.measure(vae, dataset.test, device)
    measures |= text_stage.measure(recipe, infinity, vae, dataset, device)
    if network is not None:
        pipe = Pipeline(infinity, vae, NAME, family=NAME)
        drawn = text_judge.judged(recipe, pipe, dataset.test, network, samples, progress)
        measures |= drawn.measures | {"samples": samples}
        shown = spread(samples, min(SHOWN, samples)).tolist()
        picture = gallery(drawn.pixels[shown], [drawn.texts[place] for place in shown])
        write_png(out / SAMPLES_FILE, picture)
    record = identity | {
        "steps": reached,
        "measures": measures,
        "losses": {one.name: one.losses for one in (first, second)},
        "seconds": {one.name: round(one.seconds, 1) for one in (first, second)},
        **machine(device),
    }
    write_atomic(out / RECORD, json.dumps(record, indent=1).encode() + b"\n")
    return record


def _of_bits(identity: dict[str, Any]) -> dict[str, Any]:
    """What decides the first stage, which does not know the second."""
    return identity | {"recipe": {k: v for k, v in identity["recipe"].items() if k != "infinity"}}


def _pool(recipe: TextRecipe, dataset: data.Dataset) -> str:
    """Different captions of test images, spread over the classes, one a line."""
    images = dataset.test
    numbers = spread(len(images.labels), min(2 * POOL, len(images.labels)))
    found = dict.fromkeys(text_stage.captions_of(images, numbers, recipe.seed))
    chosen = [list(found)[place] for place in spread(len(found), min(POOL, len(found))).tolist()]
    return "\n".join(chosen) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_options(parser, Path("out/train_text"))
    parser.add_argument("--lpips", type=Path, help="weights of the perceptual loss, .safetensors")
    parser.add_argument(
        "--start", type=Path, nargs="+", default=[], help="weights of models to start from"
    )
    parser.add_argument("--network", type=Path, help="weights of ResNet-56, to measure samples")
    parser.add_argument("--samples", type=int, default=1000, help="images that are measured")
    parser.add_argument("--as-it-is", action="store_true", help="train nothing, write the files")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    try:
        recipe = TextRecipe.from_file(arguments.recipe) if arguments.recipe else TextRecipe()
        if (recipe.bits.perceptual > 0) != (arguments.lpips is not None):
            raise ConfigError(
                f"perceptual {recipe.bits.perceptual}: a perceptual loss and --lpips go together"
            )
        lpips = Lpips.load(arguments.lpips, device) if arguments.lpips else None
        network = load_network(f"resnet56:{arguments.network}") if arguments.network else None
        with RichProgress() as progress:
            record = run(
                recipe,
                arguments.data,
                arguments.out,
                device,
                lpips,
                arguments.start,
                network=network,
                samples=arguments.samples,
                go_on=not arguments.as_it_is,
                progress=progress,
            )
    except VarptqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record["measures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
