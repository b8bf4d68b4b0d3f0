"""Train the decoder of a finished model on, against a discriminator; tokens stay what they are.

    python examples/train_demo/decoder.py --var FILE --vae FILE --data CIFAR --out out/decoder

Give the same command again after a stop and it goes on. OUT gets vae_demo.safetensors, `vae` with
another decoder (upstream's names, float16, averaged weights), and record.json. The transformer is
read for its scales only and fits the new file as it fits the old one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import data
import decoder_stage
import loop
import torch
import var_stage
import vqvae_stage
from recipe import DecoderRecipe
from train import RECORD, VAE_FILE, add_run_options, machine, vqvae_tensors, write

import varptq
from varptq.errors import VarptqError
from varptq.files import write_atomic
from varptq.models.pipeline import Pipeline
from varptq.progress import Progress, RichProgress


def run(
    recipe: DecoderRecipe, pipe: Pipeline, folder: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """The stage and its file; the content of record.json."""
    vqvae, device = pipe.vae, pipe.device
    dataset = data.load(folder, out / "images.npz", vqvae.image_size[0])
    before = vqvae_stage.measure(vqvae, dataset.test, device)
    tokens = out / "tokens.npz"
    ids_2NL = var_stage.tokens(vqvae, dataset.train, tokens, "tokens", device, progress)
    identity = {
        "recipe": recipe.to_dict(),
        "images": [len(dataset.train.labels), len(dataset.test.labels)],
        "vae": pipe.sources["vae"],
    }
    pair = decoder_stage.build(recipe, vqvae, device)
    only = decoder_stage.stage(recipe, pair, vqvae, ids_2NL, dataset.train, device, identity)
    loop.train(only, out / "decoder.state.pt", progress)
    vqvae.eval().requires_grad_(False)
    write(vqvae_tensors(vqvae), out / VAE_FILE)
    record = identity | {
        "measures": {"before": before, "after": vqvae_stage.measure(vqvae, dataset.test, device)},
        "losses": {only.name: only.losses},
        "seconds": {only.name: round(only.seconds, 1)},
        **machine(device),
    }
    write_atomic(out / RECORD, json.dumps(record, indent=1).encode() + b"\n")
    return record


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--var", type=Path, required=True, help="transformer of the model")
    parser.add_argument("--vae", type=Path, required=True, help="VQVAE to begin with")
    add_run_options(parser, Path("out/decoder"))
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    try:
        given = arguments.recipe
        recipe = DecoderRecipe.from_file(given) if given else DecoderRecipe()
        pipe = varptq.load_model(var=arguments.var, vae=arguments.vae, device=arguments.device)
        with RichProgress() as progress:
            record = run(recipe, pipe, arguments.data, arguments.out, progress)
    except VarptqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record["measures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
