"""Checkpoint files of random weights, for trials of models that are larger than memory.

A transformer whose family fills it module by module is never there as a whole: the values of a
module go into a shard, and the module is empty again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varptq.errors import OutputError
from varptq.models import presets
from varptq.models.autoencoder import Autoencoder
from varptq.models.families import family
from varptq.models.family import Family, ModelPreset
from varptq.models.placement import checked_dtype
from varptq.models.shards import INDEX_SUFFIX
from varptq.models.transformer import Transformer
from varptq.torch_state import plain_torch

SHARD_BYTES = 2 * 10**9
SHARD_NAME = "model-{:05}.safetensors"
INDEX_NAME, AUTOENCODER_NAME = f"model.safetensors{INDEX_SUFFIX}", "autoencoder.safetensors"


@plain_torch()
@torch.no_grad()
def write_random(
    model: str | ModelPreset,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str | torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[Path, Path]:
    """Write the weights of `build_model(model, seed=seed, dtype=dtype)` below `folder`; returns the
    index of the transformer's shards and the file of the autoencoder.

    A shard ends once it holds `shard_bytes`. Raises `OutputError` for a folder that holds anything,
    `InputError` for a model that is unknown.
    """
    preset = presets.preset(model) if isinstance(model, str) else model
    row, folder, dtype = family(preset.family), Path(folder), checked_dtype(dtype)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"folder {folder}: is not empty; give another one")
    shards = folder / "transformer"
    shards.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        transformer, autoencoder = row.build(preset.transformer_arch, preset.autoencoder_arch)
    transformer.to(dtype=dtype)
    autoencoder.to(dtype=dtype)
    weight_map: dict[str, str] = {}
    parts = _filled(row, transformer, autoencoder, generator)
    for number, tensors in enumerate(_shards(transformer, parts, shard_bytes), 1):
        name = SHARD_NAME.format(number)
        save_file(tensors, shards / name)
        weight_map |= dict.fromkeys(tensors, name)
    save_file(_stored(autoencoder.state_dict()), folder / AUTOENCODER_NAME)
    index = shards / INDEX_NAME
    index.write_text(json.dumps({"weight_map": weight_map}, indent=1, sort_keys=True) + "\n")
    return index, folder / AUTOENCODER_NAME


def _filled(
    row: Family, transformer: Transformer, autoencoder: Autoencoder, generator: torch.Generator
) -> Iterator[nn.Module]:
    """The modules of the transformer, each once it has values; the autoencoder has them at the
    end."""
    if row.randomize_parts is not None:
        yield from row.randomize_parts(transformer, autoencoder, generator)
    else:
        row.randomize(transformer, autoencoder, generator)
        yield from transformer.modules()


def _shards(
    transformer: Transformer, parts: Iterator[nn.Module], size: int
) -> Iterator[dict[str, Tensor]]:
    """The tensors in shards of at least `size` bytes, what is left in the last one; a module whose
    tensors are in a shard holds none any more."""
    names = {id(module): name for name, module in transformer.named_modules()}
    kept, shard = set(transformer.state_dict()), dict[str, Tensor]()
    for module in parts:
        prefix = f"{names[id(module)]}.".removeprefix(".")
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        named = {f"{prefix}{key}": tensor for key, tensor in own}
        shard |= _stored({name: tensor for name, tensor in named.items() if name in kept})
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype, device="cpu")
        if sum(tensor.nbytes for tensor in shard.values()) >= size:
            yield shard
            shard = {}
    yield shard


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
