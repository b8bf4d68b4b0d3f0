"""config.json of an artifact: its fields, and the checks that make it safe to build a model from.

`SealedDocument` mirrors the file. Its `varptq.config`, the whole `QuantConfig`, says how the model
is quantized; the block `quantization_config` is derived from it and says the same as far as
compressed-tensors can express it. The limits keep a hostile file from asking for a model too large
to build. Reading and writing are in load.py and save.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import nn

from varptq.artifact.format import VAR_PREFIX, WEIGHTS_FILE
from varptq.errors import InputError
from varptq.models.scales import Scales
from varptq.models.var import VARArch
from varptq.models.vqvae import NORM_GROUPS, VQVAEArch
from varptq.quant.config import QuantConfig, TensorSpec
from varptq.quant.layers import QuantLinear
from varptq.settings import Settings

MAX_CONFIG_BYTES = 16 * 2**20
# Far above any known model, and small enough that empty modules are built in seconds.
Size = Annotated[int, Field(ge=1, le=2**20)]
Few = Annotated[int, Field(ge=1, le=128)]
Side = Annotated[int, Field(ge=1, le=1024)]
Sides = Annotated[tuple[Side, ...], Field(min_length=1, max_length=64)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Transformer(Settings):
    """`VARArch` as plain values; `scales` are the sides of the token maps."""

    num_classes: Size
    depth: Few
    width: Size
    num_heads: Size
    scales: Sides
    codebook_size: Size
    code_dim: Size
    l2_norm: bool
    shared_adaln: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} does not divide into {self.num_heads} heads")
        return self

    @classmethod
    def of(cls, arch: VARArch) -> Self:
        values: dict[str, Any] = {**asdict(arch), "scales": arch.scales.sides}
        return cls(**values)

    def arch(self) -> VARArch:
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        values["scales"] = Scales(self.scales)
        return VARArch(**values)


class Autoencoder(Settings):
    """`VQVAEArch` as plain values."""

    ch: Annotated[int, Field(ge=1, le=2**13)]
    ch_mult: Annotated[tuple[Few, ...], Field(min_length=1, max_length=10)]
    num_res_blocks: Annotated[int, Field(ge=1, le=8)]
    code_dim: Size
    codebook_size: Size
    num_phi: Few
    attn_levels: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=10)]
    mid_attn: bool
    quant_kernel: Annotated[int, Field(ge=1, le=15)]
    hit_scales: Annotated[int, Field(ge=0, le=256)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if any(self.ch * multiple % NORM_GROUPS for multiple in (1, *self.ch_mult)):
            raise ValueError(f"channels are not multiples of {NORM_GROUPS}")
        if any(level >= len(self.ch_mult) for level in self.attn_levels):
            raise ValueError(f"attn_levels {self.attn_levels} beyond {len(self.ch_mult)} levels")
        return self

    @classmethod
    def of(cls, arch: VQVAEArch) -> Self:
        return cls(**asdict(arch))

    def arch(self) -> VQVAEArch:
        return VQVAEArch(**{name: getattr(self, name) for name in type(self).model_fields})


class Architecture(Settings):
    """Both networks; they must share the codebook."""

    var: Transformer
    vae: Autoencoder

    @model_validator(mode="after")
    def _pair(self) -> Self:
        for field in ("codebook_size", "code_dim"):
            if getattr(self.var, field) != getattr(self.vae, field):
                raise ValueError(f"{field} differs between var and vae")
        return self


class Recipe(Settings):
    """The block `varptq`: how the codes were made and how to use them."""

    config: QuantConfig
    method: str
    theta: Annotated[float, Field(gt=0)] | None
    seed: int
    calibration: dict[str, Any]
    report: dict[str, Any]


class FileEntry(Settings):
    """Size and hash of model.safetensors."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Document(Settings):
    """config.json without `files`, which is known only after the weights are written."""

    format_version: int
    varptq_version: str
    name: str
    class_names: tuple[str, ...]
    architecture: Architecture
    quantization_config: dict[str, Any]
    varptq: Recipe
    sources: dict[str, str]
    sizes: dict[str, dict[str, int]]

    @model_validator(mode="after")
    def _names(self) -> Self:
        names, classes = len(self.class_names), self.architecture.var.num_classes
        if names not in (0, classes):
            raise ValueError(f"class_names has {names} entries for {classes} classes")
        return self


class SealedDocument(Document):
    """config.json as it is in the folder."""

    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if list(self.files) != [WEIGHTS_FILE]:
            raise ValueError(f"files lists {list(self.files)}, expected {WEIGHTS_FILE} alone")
        return self


def digest(document: dict[str, Any]) -> str:
    """SHA-256 of a document of plain values without `files`, independent of spacing and order.

    The weights file stores it, so that neither file can be changed or exchanged alone.
    """
    rest = {key: value for key, value in document.items() if key != "files"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any, what: str) -> Any:
    """`value` as strict JSON values: tuples become lists, NaN and infinity null.

    Raises `InputError` naming what cannot be stored.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item, f"{what}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{what}.{key}") for key, item in value.items()}
    raise InputError(f"{what}: a {type(value).__name__} cannot be stored, expected plain values")


def compressed_tensors_block(var: nn.Module) -> dict[str, Any]:
    """How a converted model's Linear layers are quantized, as compressed-tensors describes it.

    Layers that are treated alike form a group. What it cannot express (sign-split inputs,
    attention, range rules) is only in `varptq.config`.
    """
    groups: dict[str, dict[str, Any]] = {}
    ignore = []
    for name, module in var.named_modules():
        if isinstance(module, nn.Linear):
            ignore.append(VAR_PREFIX + name)
        elif isinstance(module, QuantLinear):
            scheme = _scheme(module)
            group = groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})
            group["targets"].append(VAR_PREFIX + name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": ignore,
    }


def _scheme(linear: QuantLinear) -> dict[str, Any]:
    weight, input_ = linear.spec.weight, linear.spec.input
    weight_group = weight.group_for(linear.in_features, linear.layer) if weight else None
    return {
        "weights": _arguments(weight, weight_group, "channel", dynamic=False),
        "input_activations": _arguments(input_, linear.input_group, "token", dynamic=True),
    }


def _arguments(
    spec: TensorSpec | None, group: int | None, whole_row: str, *, dynamic: bool
) -> dict[str, Any] | None:
    if spec is None:
        return None
    return {
        "num_bits": spec.num_bits,
        "type": "int",
        "symmetric": spec.type == "sign_split",
        "strategy": "group" if group else whole_row,
        "group_size": group,
        "dynamic": dynamic,
    }
