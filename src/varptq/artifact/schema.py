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
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import nn

from varptq.artifact.format import TRANSFORMER, WEIGHTS_FILE
from varptq.errors import InputError
from varptq.models.families import family
from varptq.models.family import ArchitectureDocument
from varptq.quant.config import QuantConfig, TensorSpec
from varptq.quant.layers import QuantLinear
from varptq.quant.quantizers import QUANTIZERS
from varptq.settings import Settings

MAX_CONFIG_BYTES = 16 * 2**20
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Architecture(Settings):
    """The family, and its two networks in its own words."""

    family: str
    transformer: dict[str, Any]
    autoencoder: dict[str, Any]

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.document()
        return self

    def document(self) -> ArchitectureDocument:
        """What the family makes of it. Raises `ConfigError`."""
        values = {"transformer": self.transformer, "autoencoder": self.autoencoder}
        return family(self.family).document.from_dict(values)

    @classmethod
    def of(cls, name: str, transformer: Any, autoencoder: Any) -> Self:
        return cls(family=name, **family(name).document.of(transformer, autoencoder).to_dict())


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
        names, expected = len(self.class_names), self.architecture.document().num_names()
        if expected is not None and names not in (0, expected):
            raise ValueError(f"class_names has {names} entries for {expected} classes")
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
            ignore.append(TRANSFORMER + name)
        elif isinstance(module, QuantLinear):
            scheme = _scheme(module)
            group = groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})
            group["targets"].append(TRANSFORMER + name)
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
        "symmetric": QUANTIZERS[spec.type].symmetric,
        "strategy": "group" if group else whole_row,
        "group_size": group,
        "dynamic": dynamic,
    }
