"""The autoencoder in an artifact: every precision comes back, older artifacts mean float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from artifact.conftest import Document, State, forged, tiny_quantized
from artifact.test_save_load import assert_same
from varptq.artifact import load, save
from varptq.artifact.sizes import VAE, sizes
from varptq.errors import ArtifactError
from varptq.quant.config import LayerRule, QuantConfig
from varptq.quant.find import quant_convolutions
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import on_integers
from varptq.runtime.reference import ReferenceKernels

WEIGHT = "autoencoder.decoder.mid.block_1.conv1.weight"
SCALE = "autoencoder.decoder.mid.block_1.conv1.weight_scale"


@pytest.fixture(scope="module")
def in_int8() -> QuantizedPipeline:
    return tiny_quantized("w4a4+paper+vae8")


@pytest.fixture(scope="module")
def folder(in_int8: QuantizedPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(in_int8, tmp_path_factory.mktemp("int8") / "model")


@pytest.mark.parametrize("modifier", ["vae8", "vae16"])
def test_every_precision_comes_back_bit_for_bit(tmp_path: Path, modifier: str) -> None:
    quantized = tiny_quantized(f"w4a4+paper+{modifier}")
    loaded = load(save(quantized, tmp_path / "model"))
    assert_same(quantized, loaded)
    again = save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_what_is_on_the_disk(folder: Path, in_int8: QuantizedPipeline) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        dtypes = {name: view.get_dtype() for name, view in views.items()}
        assert tuple(views[SCALE].get_shape()) == (32,)
    for name, layer in quant_convolutions(in_int8.vae).items():
        assert dtypes[f"autoencoder.{name}.weight"] == "I8"
        assert dtypes[f"autoencoder.{name}.weight_scale"] == "F32"
        assert dtypes[f"autoencoder.{name}.bias"] == "F32", layer
    assert dtypes["autoencoder.decoder.conv_out.weight"] == "F32"


def test_sizes_are_those_of_the_file_on_every_runtime(
    folder: Path, in_int8: QuantizedPipeline
) -> None:
    stored: dict[str, Tensor] = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            stored[name] = file.get_tensor(name)
    ours = {name: t for name, t in stored.items() if name.startswith("autoencoder.")}
    size = sizes(in_int8)[VAE]
    assert size.bytes == sum(t.numel() * t.element_size() for t in ours.values())
    steps = {name: t for name, t in ours.items() if name.endswith("weight_scale")}
    assert size.grid_bytes == 4 * sum(t.numel() for t in steps.values()) > 0
    # The float model has no steps, so they are no elements.
    assert size.elements == sum(t.numel() for n, t in ours.items() if n not in steps)
    w8a8 = tiny_quantized("w8a8")
    assert sizes(on_integers(w8a8, ReferenceKernels())) == sizes(w8a8)


def test_an_artifact_without_the_field_is_float(pristine: Path, tmp_path: Path) -> None:
    def older(document: Document) -> None:
        assert document["varptq"]["config"].pop("autoencoder") == "float32"

    found = load(forged(pristine, tmp_path / "older", config=older))
    assert found.config.autoencoder == "float32"
    assert not quant_convolutions(found.vae)
    before = load(pristine).vae.state_dict()
    assert all(torch.equal(t, before[name]) for name, t in found.vae.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[SCALE].zero_(), rf"tensor '{SCALE}' holds values that are not above 0$"),
        (lambda s: s[SCALE].fill_(float("nan")), rf"tensor '{SCALE}' holds NaN or infinity$"),
        (lambda s: s.pop(SCALE), rf"tensor '{SCALE}' is missing, config.json asks for it$"),
        (
            lambda s: s.update({WEIGHT: s[WEIGHT].float()}),
            rf"'{WEIGHT}' is F32 \(32, 32, 3, 3\), config.json asks for I8 \(32, 32, 3, 3\)$",
        ),
    ],
)
def test_tensors_that_were_never_written_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[State], object], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(forged(folder, tmp_path / "forged", tensors=change))


def test_a_precision_that_does_not_exist_is_one_line(folder: Path, tmp_path: Path) -> None:
    def wrong(document: Document) -> None:
        document["varptq"]["config"]["autoencoder"] = "int3"

    message = r"varptq\.config\.autoencoder is 'int3': Input should be 'float32', 'bf16' or 'int8'$"
    with pytest.raises(ArtifactError, match=message):
        load(forged(folder, tmp_path / "forged", config=wrong))


def test_a_rule_is_stored(tmp_path: Path) -> None:
    from artifact.conftest import tiny_pipeline
    from varptq.calibrate.quantize import quantize

    rule = LayerRule(targets="decoder.up.*", autoencoder="bf16")
    config = QuantConfig.preset("w4a4+paper+vae8").with_rules(rule)
    quantized = quantize(tiny_pipeline(), config, method="rtn")
    found = {layer.precision for layer in quant_convolutions(quantized.vae).values()}
    assert found == {"int8", "bf16"}
    assert_same(quantized, load(save(quantized, tmp_path / "model")))
