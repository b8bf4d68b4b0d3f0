"""Read an artifact back, every step checked before the next.

    config.json -> document -> modules without memory -> does the header of model.safetensors fit?
    -> does its SHA-256? -> tensors, one after another into the modules -> QuantizedPipeline

No tensor is allocated before its shape has been checked, nothing is unpickled, and any fault of the
files is one `ArtifactError`. The file is mapped and copied tensor by tensor, so that loading takes
hardly more memory than the loaded model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varptq import hub
from varptq.artifact.digest import Digest
from varptq.artifact.format import (
    AUTOENCODER,
    CONFIG_FILE,
    FORMAT_VERSION,
    SCALE,
    SEAL,
    TRANSFORMER,
    UNPACKED,
    WEIGHTS_FILE,
    Slot,
    linear_slots,
    packed_linears,
    plain_tensors,
    slots,
    unpack_linear,
)
from varptq.artifact.mapped import MappedTensors, Unchanged, return_free_memory
from varptq.artifact.schema import (
    MAX_CONFIG_BYTES,
    SealedDocument,
    compressed_tensors_block,
    digest,
)
from varptq.errors import ArtifactError, CheckpointError, ConfigError, is_out_of_memory
from varptq.files import is_whole, utf8_name
from varptq.models.autoencoder import Autoencoder
from varptq.models.families import family
from varptq.models.meta import on_meta
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.presets import encoder_of
from varptq.models.seams import start_gains
from varptq.models.transformer import Transformer
from varptq.quant.convert import convert, convert_autoencoder
from varptq.quant.find import quant_convolutions, release_float_weights, set_theta
from varptq.quant.pipeline import QuantizedPipeline
from varptq.torch_state import plain_torch

Adopt = Callable[[Transformer, str], None]


class Blank(NamedTuple):
    """An artifact without its weights: the validated config.json, its `digest`, and both networks
    on the meta device, where tensors have shapes but no memory. hashed: the weights' SHA-256, where
    they will be read."""

    document: SealedDocument
    seal: str
    var: Transformer
    vae: Autoencoder
    hashed: Digest | None = None


@plain_torch()
def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    adopt: Adopt | None = None,
    blank: Blank | None = None,
) -> QuantizedPipeline:
    """The quantized pipeline stored in `folder`, with the codes and scales it was saved with.

    dtype: of the float parts and of the arithmetic; scales stay float32. It computes "simulated";
    `varptq.runtime.load` chooses another runtime. adopt: called with the transformer and the name
    of each quantized layer once the layer is complete, and may replace it by another module, so
    that one layer is unpacked at a time; the image encoder then stays on the mapped file. blank: of
    this folder, from `reading_blank`, where the caller has it; its networks are used up. Raises
    `ConfigError` for a device that this machine lacks or a dtype in which no model computes,
    `ArtifactError` naming the file and what is wrong with it.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    if blank is None:
        with reading_blank(folder) as blank:
            return load(folder, device=device, dtype=dtype, adopt=adopt, blank=blank)
    document, var, vae = blank.document, blank.var, blank.vae
    path = Path(folder) / WEIGHTS_FILE
    tensors = _open_tensors(path, blank)
    _fill_plain(var, vae, tensors, path, stay=adopt is not None)
    _fill_linears(var, tensors, path, adopt)
    recipe = document.varptq
    pipeline = QuantizedPipeline(
        var.eval().requires_grad_(False),
        vae.eval().requires_grad_(False),
        document.name,
        document.class_names,
        dict(document.sources),
        family=document.architecture.family,
        encoder=encoder_of(document.name),
        config=recipe.config,
        method=recipe.method,
        theta=recipe.theta,
        seed=recipe.seed,
        calibration=dict(recipe.calibration),
        report=dict(recipe.report),
    )
    return pipeline.to(device=device, dtype=dtype)


def read_blank(folder: str | Path) -> Blank:
    """The config of an artifact and its networks without values; the weights are not read. Raises
    `ArtifactError`."""
    document, seal = read_config(folder)
    return Blank(document, seal, *_empty_modules(Path(folder), document))


@contextmanager
def reading_blank(folder: str | Path) -> Iterator[Blank]:
    """`read_blank` for `load`: the weights are hashed meanwhile."""
    hashed = Digest(Path(folder) / WEIGHTS_FILE)
    try:
        yield read_blank(folder)._replace(hashed=hashed)
    finally:
        hashed.stop()


def read_config(folder: str | Path) -> tuple[SealedDocument, str]:
    """The validated config.json and its `digest`; the weights are not read.

    Raises `ArtifactError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file, expected a folder" if folder.exists() else "no such folder"
        raise ArtifactError(f"artifact {folder}: {found} with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not is_whole(folder):
        raise ArtifactError(
            f"artifact {folder}: not whole, a run is writing it or was killed while it did; wait, "
            "or run it again"
        )
    path = folder / CONFIG_FILE
    content = _parse(path)
    _check_version(path, content)
    try:
        return SealedDocument.from_dict(content), digest(content)
    except (ValueError, RecursionError) as error:
        # ConfigError is a ValueError; the others come from numbers and nesting that JSON does not
        # allow.
        raise ArtifactError(f"{path}: {_line(error)}") from None


def check_files(folder: str | Path) -> None:
    """Raise `ArtifactError` for an artifact whose files are not those that were saved; the contents
    of the tensors are not looked at."""
    with reading_blank(folder) as blank:
        _open_tensors(Path(folder) / WEIGHTS_FILE, blank)


def _parse(path: Path) -> dict[str, Any]:
    _check_file(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise ArtifactError(
            f"{path}: larger than {MAX_CONFIG_BYTES} bytes, so not the config of an artifact"
        )
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({_line(error)}); {_damaged(path)}") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_version(path: Path, content: dict[str, Any]) -> None:
    found = content.get("format_version")
    if type(found) is not int:
        raise ArtifactError(
            f"{path}: format_version is {found!r:.80}, expected {FORMAT_VERSION}; "
            "not an artifact of varptq"
        )
    if found != FORMAT_VERSION:
        remedy = "update varptq" if found > FORMAT_VERSION else "quantize the model again"
        raise ArtifactError(
            f"{path}: format_version {found!r:.80}, this varptq reads {FORMAT_VERSION}; {remedy}"
        )


def _check_file(path: Path) -> None:
    if not path.is_file():
        found = "is not a file" if path.exists() else "is missing"
        raise ArtifactError(f"{path}: {found}; give the folder of an artifact, copied whole")


def _empty_modules(folder: Path, document: SealedDocument) -> tuple[Transformer, Autoencoder]:
    path = folder / CONFIG_FILE
    row, archs = family(document.architecture.family), document.architecture.document().archs()
    try:
        with on_meta():
            var, vae = row.build(*archs)
            var = convert(var, document.varptq.config, in_place=True)
            vae = convert_autoencoder(vae, document.varptq.config, in_place=True)
    except ConfigError as error:
        raise ArtifactError(f"{path}: {_line(error)}") from None
    release_float_weights(var)
    set_theta(var, document.varptq.theta)
    if document.quantization_config != compressed_tensors_block(var):
        raise ArtifactError(
            f"{path}: quantization_config contradicts varptq.config; {_damaged(path)}"
        )
    return var, vae


def _open_tensors(path: Path, blank: Blank) -> MappedTensors:
    """The tensors of the file, after checking header, hash and seal."""
    _check_file(path)
    entry = blank.document.files[WEIGHTS_FILE]
    try:
        found = path.stat().st_size
        if found != entry.bytes:
            raise ArtifactError(
                f"{path}: has {found} bytes, {CONFIG_FILE} says {entry.bytes}; "
                + _damaged(path, "truncated or of another artifact")
            )
        with utf8_name(path) as name, safe_open(name, framework="pt", device="cpu") as file:
            _check_header(path, file, _slots(blank.var, blank.vae, set(file.keys())))
            if (blank.hashed or Digest(path)).result() != entry.sha256:
                raise ArtifactError(
                    f"{path}: SHA-256 is not that of {CONFIG_FILE}; {_damaged(path)}"
                )
            if (file.metadata() or {}).get(SEAL) != blank.seal:
                config = path.with_name(CONFIG_FILE)
                raise ArtifactError(
                    f"{config}: not the config that {WEIGHTS_FILE} was saved with; {_damaged(path)}"
                )
        return MappedTensors(path)
    except (SafetensorError, CheckpointError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ArtifactError(f"{path}: cannot be read ({_line(error)}); {_damaged(path)}") from None


def _slots(var: Transformer, vae: Autoencoder, names: set[str]) -> dict[str, Slot]:
    """What the file has to hold, after the norms of `var` have got the gains that are among its
    `names`: whether inputs were smoothed depends on the method."""
    own = {name.removeprefix(TRANSFORMER) for name in names}
    start_gains(var, own, torch.empty(var.width, dtype=var.dtype, device=var.device))
    return slots(var, vae)


def _check_header(path: Path, file: Any, expected: dict[str, Slot]) -> None:
    """Compare names, shapes and dtypes with those of the architecture."""
    found = set(file.keys())
    for name, slot in expected.items():
        if name not in found:
            raise ArtifactError(f"{path}: tensor {name!r} is missing, {CONFIG_FILE} asks for it")
        view = file.get_slice(name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != slot.shape or dtype not in slot.dtypes:
            raise ArtifactError(
                f"{path}: tensor {name!r} is {dtype} {shape}, {CONFIG_FILE} asks for "
                f"{' or '.join(slot.dtypes)} {slot.shape}"
            )
    if extra := sorted(found - expected.keys()):
        raise ArtifactError(
            f"{path}: tensor {extra[0]!r:.80} does not belong to the model of {CONFIG_FILE}"
        )


def _fill_plain(
    var: Transformer, vae: Autoencoder, tensors: MappedTensors, path: Path, *, stay: bool
) -> None:
    """Check what is stored as it is and give it to the modules. With `stay` what only reading an
    image needs stays on the mapping."""
    state: dict[str, Tensor] = {}
    encoding = tuple(f"{AUTOENCODER}{name}." for name in vae.ENCODING) if stay else ()
    steps = {f"{AUTOENCODER}{layer}.{SCALE}" for layer in quant_convolutions(vae)}
    for name in plain_tensors(var, vae):
        stays = name.startswith(encoding)
        tensor = tensors.view(name) if stays else tensors.take(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"{path}: tensor {name!r} holds NaN or infinity")
        if name in steps and not bool((tensor > 0).all()):
            raise ArtifactError(f"{path}: tensor {name!r} holds values that are not above 0")
        if stays:
            tensors.drop(name)
        state[name] = tensor
    for name in vae.ENCODING if stay else ():
        module = vae.get_submodule(name)
        module.register_forward_pre_hook(Unchanged(tensors))
    for name, expected in var.constants().items():
        if not torch.equal(state[TRANSFORMER + name], expected):
            raise ArtifactError(f"{path}: tensor {name!r} contradicts the scales in {CONFIG_FILE}")
    for prefix, module in ((TRANSFORMER, var), (AUTOENCODER, vae)):
        part = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
        left = module.load_state_dict(part, strict=False, assign=True)
        assert {name.rpartition(".")[2] for name in left.missing_keys} <= set(UNPACKED)


def _fill_linears(
    var: Transformer, tensors: MappedTensors, path: Path, adopt: Adopt | None
) -> None:
    """Check and unpack the codes of one layer after another."""
    layers = packed_linears(var)
    while layers:
        # Keep no reference to the layer: after adoption its codes may not be needed any more.
        layer = next(iter(layers))
        linear = layers.pop(layer)
        names = linear_slots(linear)
        stored = {name: tensors.view(f"{TRANSFORMER}{layer}.{name}") for name in names}
        for name, tensor in stored.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ArtifactError(
                    f"{path}: tensor {f'{TRANSFORMER}{layer}.{name}'!r} holds NaN or infinity"
                )
        try:
            linear.load_codes(**unpack_linear(linear, stored))
        except ValueError as error:
            raise ArtifactError(f"{path}: layer {layer}: {error}") from None
        for name in names:
            tensors.drop(f"{TRANSFORMER}{layer}.{name}")
        if adopt is not None:
            adopt(var, layer)
            return_free_memory()


def _damaged(path: Path, usual: str = "damaged or altered, copy the artifact again") -> str:
    """What is wrong with a file that is not the one that was saved, and what to do."""
    return hub.remedy(path) or usual


def _line(error: Exception) -> str:
    """The first line of a message, at most 300 characters."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
