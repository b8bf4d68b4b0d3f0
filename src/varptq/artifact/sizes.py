"""How many bytes each kind of tensor takes, float or packed, for `varptq info`.

    bits per weight = 8 * (packed codes + scales + zero points) / weights

Counted from the tensors as an artifact stores them, without the header of the file (kilobytes).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from varptq.artifact.format import (
    AUTOENCODER,
    PACKED,
    SCALE,
    TRANSFORMER,
    Slot,
    linear_slots,
    plain_tensors,
)
from varptq.models.families import family
from varptq.models.meta import on_meta
from varptq.models.pipeline import Pipeline
from varptq.models.seams import SeamLinear, start_gains
from varptq.models.transformer import float_layout
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert, convert_autoencoder
from varptq.quant.describe import float_modules
from varptq.quant.find import quant_convolutions
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline

FLOAT_PARTS, CENTRING, VAE = "float parts", "centring", "vae"
KINDS = (
    *("word_embed", "ada_lin", "shared_ada_lin", "mat_qkv", "proj", "fc1", "fc2", "head"),
    *(FLOAT_PARTS, CENTRING, VAE),
)
# Tensors that centred inputs add to a model, by the last part of the name.
CENTRING_TENSORS = ("means", "mean_bias")
DTYPE_BYTES = {"I32": 4, "F32": 4, "I64": 8}
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class KindSize:
    """`elements` numbers of the float model in `bytes`, of which `grid_bytes` are scales, zero
    points and shapes."""

    elements: int = 0
    bytes: int = 0
    grid_bytes: int = 0

    @property
    def bits_per_element(self) -> float:
        """Effective bits, scales and zero points included; 0 for an empty kind."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def float32_bytes(self) -> int:
        """What the same numbers take in float32."""
        return FLOAT32_BYTES * self.elements

    def __add__(self, other: KindSize) -> KindSize:
        return KindSize(
            self.elements + other.elements,
            self.bytes + other.bytes,
            self.grid_bytes + other.grid_bytes,
        )

    def to_dict(self) -> dict[str, int]:
        """Plain JSON values."""
        return {**asdict(self), "float32_bytes": self.float32_bytes}


def sizes(pipeline: Pipeline) -> dict[str, KindSize]:
    """Size by kind, for a float or a quantized pipeline, in the order of `KINDS`.

    A Linear's weight counts under its kind, "float parts" is the rest of the
    transformer (biases, embeddings), "centring" are the means and bias rows that centred inputs
    add, "vae" is the autoencoder. Kinds that are absent are left out.
    """
    pipeline = as_stored(pipeline)
    found: dict[str, KindSize] = {}
    layout = float_modules(pipeline.var).items()
    kinds = {name: seam.kind for name, seam in layout if isinstance(seam, SeamLinear)}
    weights: dict[str, str] = {}
    for name, kind in kinds.items():
        module = pipeline.var.get_submodule(name)
        if isinstance(module, QuantLinear) and module.spec.weight is not None:
            found[kind] = found.get(kind, KindSize()) + _packed_size(module)
        else:
            weights[f"{TRANSFORMER}{name}.weight"] = kind
    steps = {f"{AUTOENCODER}{layer}.{SCALE}" for layer in quant_convolutions(pipeline.vae)}
    for name, tensor in plain_tensors(pipeline.var, pipeline.vae).items():
        size = _plain_size(tensor)
        kind = VAE if name.startswith(AUTOENCODER) else weights.get(name, FLOAT_PARTS)
        if name.rpartition(".")[2] in CENTRING_TENSORS:
            # The float model has none of them, so they count as no elements.
            kind, size = CENTRING, replace(size, elements=0)
        elif name in steps:
            size = KindSize(0, size.bytes, size.bytes)
        found[kind] = found.get(kind, KindSize()) + size
    return {kind: found[kind] for kind in sorted(found, key=_position)}


def as_stored(pipeline: Pipeline) -> Pipeline:
    """`pipeline` with the modules that an artifact describes. Those of an integer runtime have
    packed their codes away, so the same layers are made without memory."""
    if not isinstance(pipeline, QuantizedPipeline) or pipeline.runtime == "simulated":
        return pipeline
    return foreseen(pipeline, pipeline.config)


def foreseen(pipeline: Pipeline, config: QuantConfig, dtype: torch.dtype | None = None) -> Pipeline:
    """What `config` makes of the model, in `dtype` or its own, as modules without memory. Raises
    `ConfigError` as `convert` does."""
    dtype = dtype or pipeline.dtype
    blank = float_layout(pipeline.var).to(dtype)
    like = torch.empty(blank.width, dtype=blank.dtype, device=blank.device)
    start_gains(blank, set(pipeline.var.state_dict()), like)
    with on_meta():
        vae = family(pipeline.family).autoencoder(pipeline.vae.arch, pipeline.var.arch)
    return replace(
        pipeline,
        var=convert(blank, config),
        vae=convert_autoencoder(vae.to(dtype), config),
    )


def transformer_size(pipeline: Pipeline) -> KindSize:
    """Everything but the image decoder, together."""
    return total({kind: size for kind, size in sizes(pipeline).items() if kind != VAE})


def total(parts: dict[str, KindSize]) -> KindSize:
    """The sum over kinds."""
    return sum(parts.values(), KindSize())


def quantized_size(pipeline: Pipeline) -> KindSize:
    """All layers with quantized weights, together."""
    layers = (
        m for m in as_stored(pipeline).var.modules() if isinstance(m, QuantLinear) and m.spec.weight
    )
    return sum(map(_packed_size, layers), KindSize())


def _packed_size(linear: QuantLinear) -> KindSize:
    stored = {name: _slot_bytes(slot) for name, slot in linear_slots(linear).items()}
    codes = stored.pop(PACKED)
    grid = sum(stored.values())
    return KindSize(linear.out_features * linear.in_features, codes + grid, grid)


def _slot_bytes(slot: Slot) -> int:
    return math.prod(slot.shape) * DTYPE_BYTES[slot.dtypes[0]]


def _plain_size(tensor: Tensor) -> KindSize:
    return KindSize(tensor.numel(), tensor.numel() * tensor.element_size())


def _position(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else KINDS.index(FLOAT_PARTS)
