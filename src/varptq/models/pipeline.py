"""A float model ready to use: transformer, autoencoder and where they came from; loading and
building them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from varptq.errors import InputError, NonFiniteError
from varptq.models import presets
from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Autoencoder
from varptq.models.families import family
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.prompts import Prompts
from varptq.models.sampling import Sampler
from varptq.models.scales import Scales
from varptq.models.shards import INDEX_SUFFIX
from varptq.models.state_file import source_sha256
from varptq.models.transformer import Transformer
from varptq.torch_state import plain_torch


@dataclass
class Pipeline:
    """`var(prompts, inputs_BLc) -> logits_BLV` and `vae.encode / decode / teacher_inputs`, on one
    device.

    class_names: names of the prompts in the pool, where they have any. sources: sha256 of the files
    the weights came from, or the seed of random ones. sampler: what draws symbols. family: a name
    of `families.FAMILIES`.
    """

    var: Transformer
    vae: Autoencoder
    name: str
    class_names: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    sampler: Sampler = field(default_factory=Sampler)
    family: str = "var"

    @property
    def scales(self) -> Scales:
        return self.var.scales

    @property
    def alphabet(self) -> Alphabet:
        return self.var.alphabet

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        return self.var.dtype

    @plain_torch()
    def to(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Move and/or cast both networks in place; codes and index buffers keep their integer
        types.

        Raises `ConfigError` for a device that is not here or a dtype no model computes in, and
        `NonFiniteError` for a weight beyond the range of the dtype, before anything has changed.
        """
        device = None if device is None else checked_device(device)
        dtype = None if dtype is None else checked_dtype(dtype)
        if dtype == torch.float16:
            self._check_range(torch.float16)
        self.var.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        return self

    def _check_range(self, dtype: torch.dtype) -> None:
        largest = torch.finfo(dtype).max
        for part in (self.var, self.vae):
            for name, tensor in part.named_parameters():
                if not tensor.is_meta and float(tensor.detach().abs().max()) > largest:
                    raise NonFiniteError(
                        f"model {self.name!r}: tensor {name!r} holds numbers above {largest:g}, "
                        f"the largest of {dtype}: use bfloat16 or float32"
                    )

    def prompts(self, values: Any) -> Prompts:
        """What a caller asks for as prompts: for a class-conditional model class ids and names,
        "unconditional" being one of every model. Raises `InputError` naming the first that cannot
        be used."""
        if isinstance(values, Prompts):
            return values
        try:
            return self.var.prompts(values, self.class_names)
        except InputError as error:
            raise InputError(f"model {self.name!r}: {error}") from None

    def pool(self) -> Prompts:
        """The prompts there are to draw images for: every class once."""
        return self.var.pool(self.class_names)


@plain_torch()
def load_model(
    name: str | None = None,
    *,
    var: str | Path | None = None,
    vae: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    download: bool = False,
    cache_dir: str | Path | None = None,
) -> Pipeline:
    """A float model by preset name ("demo", "var-d16" .. "var-d36") or from two checkpoint files.

    The architecture is read off the tensors. Files are `.pth` (weights only) or `.safetensors`, or
    the index of one in shards, or the folder of one; `checkpoint.read_state` says what else is
    taken out of them.
    Presets other than "demo" come from the local hub cache, or from the hub with `download=True`.
    Raises `InputError` for contradicting arguments, `ConfigError` for a device that is not here or
    a dtype no model computes in, `CheckpointError` for files that cannot be used.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    if name is not None:
        if var is not None or vae is not None:
            raise InputError(f"model {name!r}: give either a name or the two files var= and vae=")
        preset = presets.preset(name)
        var_path, vae_path = presets.resolve(name, download=download, cache_dir=cache_dir)
        class_names, chosen = tuple(preset.class_names or ()), preset.family
    else:
        if var is None or vae is None:
            raise InputError("model: give a preset name, or both files var= and vae=")
        var_path, vae_path, class_names, chosen = Path(var), Path(vae), (), "var"
        name = Path(var_path.name.removesuffix(INDEX_SUFFIX)).stem
    transformer, autoencoder = family(chosen).read(var_path, vae_path)
    sources = {"var": source_sha256(var_path), "vae": source_sha256(vae_path)}
    pipeline = Pipeline(transformer, autoencoder, name, class_names, sources, family=chosen)
    return _frozen(pipeline.to(device=device, dtype=dtype))


@plain_torch()
def build_model(
    name: str,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> Pipeline:
    """A preset's architecture with random weights, for trials without a checkpoint. Raises as
    `load_model`."""
    device, dtype = checked_device(device), checked_dtype(dtype)
    preset = presets.preset(name)
    row = family(preset.family)
    generator = torch.Generator().manual_seed(seed)
    # torch's constructors draw from the global state, which is the caller's.
    with torch.random.fork_rng(devices=[]):
        transformer, autoencoder = row.build(preset.transformer_arch, preset.autoencoder_arch)
    row.randomize(transformer, autoencoder, generator)
    sources = {"var": f"random, seed {seed}", "vae": f"random, seed {seed}"}
    names = tuple(preset.class_names or ())
    pipeline = Pipeline(transformer, autoencoder, name, names, sources, family=row.name)
    return _frozen(pipeline.to(device=device, dtype=dtype))


def _frozen(pipeline: Pipeline) -> Pipeline:
    pipeline.var.eval().requires_grad_(False)
    pipeline.vae.eval().requires_grad_(False)
    return pipeline
