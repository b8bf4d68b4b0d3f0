"""A float model ready to use: transformer, VQVAE and where they came from; loading and building
them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from varptq.errors import CheckpointError, InputError, NonFiniteError
from varptq.models import presets
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.sampling import Sampler
from varptq.models.scales import Scales
from varptq.models.shards import INDEX_SUFFIX
from varptq.models.transformer import Transformer
from varptq.models.var.transformer import VAR, checkpoint, randomize
from varptq.models.var.vqvae import VQVAE
from varptq.torch_state import plain_torch

# The name of the row of class embeddings that stands for no class.
UNCONDITIONAL = "unconditional"


@dataclass
class Pipeline:
    """`var(labels_B, inputs_BLc) -> logits_BLV` and `vae.encode / decode / teacher_inputs`, on one
    device.

    sources: sha256 of the files the weights came from, or the seed of random ones. sampler: what
    draws ids.
    """

    var: Transformer
    vae: VQVAE
    name: str
    class_names: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    sampler: Sampler = field(default_factory=Sampler)

    @property
    def scales(self) -> Scales:
        return self.var.scales

    @property
    def num_classes(self) -> int:
        return self.var.arch.num_classes

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

    def labels(self, classes: Sequence[int | str] | Tensor) -> Tensor:
        """(B,) int64 from class ids and names, "unconditional" being one of every model. Raises
        `InputError` naming the first that does not exist."""
        values = classes.tolist() if isinstance(classes, Tensor) else classes
        # A lone name would pass as a sequence of letters.
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"labels: {values!r}, expected a list of class ids and names")
        labels = [self._label(value) for value in values]
        if not labels:
            raise InputError("labels: empty; give at least one class")
        return torch.tensor(labels, dtype=torch.int64, device=self.device)

    def guidance_rows(self, labels_B: Tensor) -> Tensor:
        """(2B,) on the model's device: the labels, then "unconditional" as often; the rows that
        guidance needs, in the order `sampling.guided` takes them."""
        labels_B = labels_B.to(self.device)
        return torch.cat((labels_B, torch.full_like(labels_B, self.num_classes)))

    def title(self, label: int) -> str:
        """Name of a class id, or "class 207" for a model without names."""
        if label == self.num_classes:
            return UNCONDITIONAL
        return self.class_names[label] if self.class_names else f"class {label}"

    def _label(self, value: Any) -> int:
        if isinstance(value, str) and not value.removeprefix("-").isdecimal():
            return self._label_of_name(value)
        if isinstance(value, bool) or not isinstance(value, Integral | str):
            raise InputError(
                f"class {value!r}: expected an id or a name, got {type(value).__name__}"
            )
        if not 0 <= int(value) < self.num_classes:
            raise InputError(
                f"class {value}: not in 0..{self.num_classes - 1} of model {self.name!r}"
            )
        return int(value)

    def _label_of_name(self, name: str) -> int:
        if name == UNCONDITIONAL:
            return self.num_classes
        if not self.class_names:
            raise InputError(f"class {name!r}: model {self.name!r} has no class names; give an id")
        if name in self.class_names:
            return self.class_names.index(name)
        # Compared in lower case: "DOG" has not one letter of "dog".
        known = {known.lower(): known for known in self.class_names}
        near = [known[match] for match in get_close_matches(name.lower(), known)]
        near = near or self.class_names[:5]
        raise InputError(f"class {name!r}: unknown; did you mean {', '.join(near)}?")


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
        class_names = tuple(preset.class_names or ())
    else:
        if var is None or vae is None:
            raise InputError("model: give a preset name, or both files var= and vae=")
        var_path, vae_path, class_names = Path(var), Path(vae), ()
        name = Path(var_path.name.removesuffix(INDEX_SUFFIX)).stem
    transformer = _load_var(var_path)
    autoencoder = _load_vae(vae_path, transformer.scales)
    checkpoint.check_pair(transformer.arch, autoencoder.arch)
    sources = {"var": checkpoint.source_sha256(var_path), "vae": checkpoint.source_sha256(vae_path)}
    pipeline = Pipeline(transformer, autoencoder, name, class_names, sources)
    return _frozen(pipeline.to(device=device, dtype=dtype))


def _load_var(path: Path) -> VAR:
    state = checkpoint.read_state(path, part="var")
    with _naming(path):
        state = checkpoint.completed(state)
        arch = checkpoint.infer_var(state)
    with torch.device("meta"):
        model = VAR(arch)
    checkpoint.load_strict(model, state, str(path))
    return model


def _load_vae(path: Path, scales: Scales) -> VQVAE:
    state = checkpoint.read_state(path, part="vae")
    with _naming(path):
        arch = checkpoint.infer_vqvae(state)
    with torch.device("meta"):
        model = VQVAE(arch, scales)
    checkpoint.load_strict(model, state, str(path))
    return model


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file before what is wrong with its tensors."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


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
    generator = torch.Generator().manual_seed(seed)
    # torch's constructors draw from the global state, which is the caller's.
    with torch.random.fork_rng(devices=[]):
        transformer = VAR(preset.var_arch)
        autoencoder = VQVAE(preset.vae_arch, preset.var_arch.scales)
    randomize(transformer, generator)
    autoencoder.randomize(generator)
    sources = {"var": f"random, seed {seed}", "vae": f"random, seed {seed}"}
    pipeline = Pipeline(transformer, autoencoder, name, tuple(preset.class_names or ()), sources)
    return _frozen(pipeline.to(device=device, dtype=dtype))


def _frozen(pipeline: Pipeline) -> Pipeline:
    pipeline.var.eval().requires_grad_(False)
    pipeline.vae.eval().requires_grad_(False)
    return pipeline
