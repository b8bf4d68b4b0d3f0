"""Train the demo model: a VQVAE, then a VAR transformer on its tokens, then two checkpoint files.

    python examples/train_demo/train.py --data CIFAR --out out/train_demo [--recipe FILE]

Give the same command again after a stop and it goes on. OUT gets the states of both loops and at
the end vae_demo.safetensors and var_demo.safetensors (upstream's names, float16, averaged weights)
with record.json: recipe, losses, test measures, times, machine. Data: see data.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data
import loop
import safetensors.torch
import torch
import var_stage
import vqvae_stage
from recipe import Recipe
from torch import Tensor, nn

import varptq
from varptq.errors import ConfigError, VarptqError
from varptq.evaluate.networks.lpips import Lpips
from varptq.files import write_atomic
from varptq.models.var.transformer import VAR
from varptq.models.var.vqvae import VQVAE
from varptq.progress import Progress, RichProgress

VAE_FILE, VAR_FILE, RECORD = "vae_demo.safetensors", "var_demo.safetensors", "record.json"


def run(
    recipe: Recipe,
    folder: Path,
    out: Path,
    device: torch.device,
    lpips: Lpips | None,
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Both stages and the files; the content of record.json."""
    side = recipe.scales.last[0] * recipe.vqvae.arch(recipe.scales).downsampling
    dataset = data.load(folder, out / "images.npz", side)
    identity = {
        "recipe": recipe.to_dict(),
        "images": [len(dataset.train.labels), len(dataset.test.labels)],
        "lpips": lpips is not None,
    }
    vqvae = vqvae_stage.build(recipe, device)
    first = vqvae_stage.stage(recipe, vqvae, dataset.train, device, lpips, identity)
    loop.train(first, out / "vqvae.state.pt", progress)
    vqvae.eval().requires_grad_(False)
    ids_2NL = var_stage.tokens(vqvae, dataset.train, out / "tokens.npz", "tokens", device, progress)
    var = var_stage.build(recipe, dataset.num_classes, device)
    labels = dataset.train.labels
    second = var_stage.stage(recipe, var, vqvae, ids_2NL, labels, device, identity)
    loop.train(second, out / "var.state.pt", progress)
    var.eval().requires_grad_(False)
    write(vqvae_tensors(vqvae), out / VAE_FILE)
    write(var_tensors(var), out / VAR_FILE)
    measures = vqvae_stage.measure(vqvae, dataset.test, device)
    measures |= var_stage.measure(var, vqvae, dataset, device)
    record = identity | {
        "measures": measures,
        "losses": {one.name: one.losses for one in (first, second)},
        "seconds": {one.name: round(one.seconds, 1) for one in (first, second)},
        **machine(device),
    }
    write_atomic(out / RECORD, json.dumps(record, indent=1).encode() + b"\n")
    return record


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "version": varptq.__version__,
    }


def vqvae_tensors(vqvae: VQVAE) -> dict[str, Tensor]:
    return half(vqvae)


def var_tensors(var: VAR) -> dict[str, Tensor]:
    """With the mask that upstream keeps as a buffer: a key is hidden from coarser queries."""
    scale_L = var.arch.scales.scale_of_L()
    hidden_LL = scale_L.view(-1, 1) < scale_L.view(1, -1)
    mask = torch.zeros(hidden_LL.shape).masked_fill(hidden_LL, -torch.inf)
    return half(var) | {"attn_bias_for_masking": mask.half()[None, None].contiguous()}


def half(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, floating ones in float16."""
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    return {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    write_atomic(path, safetensors.torch.save(dict(tensors)))


def add_run_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """What every trainer of this folder is told."""
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--recipe", type=Path, help="JSON or YAML; default: the demo's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_run_options(parser, Path("out/train_demo"))
    parser.add_argument("--lpips", type=Path, help="weights of the perceptual loss, .safetensors")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    try:
        recipe = Recipe.from_file(arguments.recipe) if arguments.recipe else Recipe()
        if (recipe.vqvae.perceptual > 0) != (arguments.lpips is not None):
            raise ConfigError(
                f"perceptual {recipe.vqvae.perceptual}: a perceptual loss and --lpips go together"
            )
        lpips = Lpips.load(arguments.lpips, device) if arguments.lpips else None
        with RichProgress() as progress:
            record = run(recipe, arguments.data, arguments.out, device, lpips, progress=progress)
    except VarptqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record["measures"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
