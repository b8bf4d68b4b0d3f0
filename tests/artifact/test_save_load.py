"""What comes back from disk is bit for bit what was saved, and saving is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from artifact.conftest import tiny_pipeline, tiny_quantized
from varptq.artifact import load, save
from varptq.artifact.format import pack_linear, unpack_linear
from varptq.calibrate.quantize import quantize
from varptq.errors import InputError, NonFiniteError, OutputError
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline, load_model
from varptq.quant.config import LinearSpec, QuantConfig, TensorSpec
from varptq.quant.find import quant_linears, quant_mixes, set_theta
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline

GOLDEN_WEIGHTS = Path(__file__).parents[1] / "golden" / "data" / "weights"


def state_of(pipe: Pipeline) -> dict[str, Tensor]:
    states = (pipe.var.state_dict(), pipe.vae.state_dict())
    return {
        f"{i} {name}": tensor for i, state in enumerate(states) for name, tensor in state.items()
    }


def assert_same(a: QuantizedPipeline, b: QuantizedPipeline) -> None:
    """Every tensor bit for bit, every setting, and the images."""
    left, right = state_of(a), state_of(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    for field in ("name", "class_names", "sources", "config", "method", "theta", "seed"):
        assert getattr(a, field) == getattr(b, field)
    assert (a.calibration, a.report) == (b.calibration, b.report)
    assert (a.var.arch, a.vae.arch) == (b.var.arch, b.vae.arch)
    images = [generate(pipe, [0, 1], seed=3).images for pipe in (a, b)]
    assert images[0] is not None and images[1] is not None
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    "preset",
    [
        "w4a4+paper",
        "w4a4+paper+litevar",
        "w4a8+paper+skip-head",
        "w6a6+paper+p8",
        "w8a8+paper+released",
        "w3a4+paper",
        "w5a5+paper",
        "w2a2+paper",
        "w4a4",
    ],
)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, preset: str) -> None:
    quantized = tiny_quantized(preset)
    assert_same(quantized, load(save(quantized, tmp_path / "model")))


def test_theta_report_and_calibration_come_back(tmp_path: Path) -> None:
    report = {"theta": {"overhead": 0.1, "status": "ok"}, "units": [{"loss": 1e-30, "name": "ç"}]}
    quantized = replace(
        tiny_quantized(), theta=0.1, seed=7, report=report, calibration={"steps": 5}
    )
    set_theta(quantized.var, quantized.theta)
    loaded = load(save(quantized, tmp_path / "model"))
    assert_same(quantized, loaded)
    assert [mix.theta for mix in quant_mixes(loaded.var)] == [0.1]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    values = {"loss": float("nan"), "list": (1, float("inf"), None)}
    loaded = load(save(replace(tiny_quantized(), report=values), tmp_path / "model"))
    assert loaded.report == {"loss": None, "list": [1, None, None]}


def test_a_report_with_other_objects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^report\.a\[1\]: a Tensor cannot be stored"):
        save(replace(tiny_quantized(), report={"a": [1, torch.zeros(1)]}), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["w4a4+paper", "w8a8+paper+litevar"])
def test_a_model_in_bfloat16_comes_back_in_bfloat16(tmp_path: Path, preset: str) -> None:
    quantized = tiny_quantized(preset, torch.bfloat16)
    folder = save(quantized, tmp_path / "model")
    assert_same(quantized, load(folder, dtype=torch.bfloat16))
    wide = load(folder)
    assert wide.dtype == torch.float32
    for name, linear in quant_linears(wide.var).items():
        assert torch.equal(linear.codes, quant_linears(quantized.var)[name].codes)


def test_a_cast_keeps_the_scales_and_the_artifact_of_it_too(tmp_path: Path) -> None:
    before = {n: m.scale.clone() for n, m in quant_linears(tiny_quantized().var).items()}
    cast = tiny_quantized().to(dtype=torch.bfloat16)
    loaded = load(save(cast, tmp_path / "model"), dtype=torch.bfloat16)
    for name, scale in before.items():
        assert torch.equal(scale, quant_linears(loaded.var)[name].scale)
    assert loaded.dtype == torch.bfloat16


def test_a_model_with_shared_adaln_comes_back(tmp_path: Path) -> None:
    files = [GOLDEN_WEIGHTS / name for name in ("var_saln.safetensors", "vae_small.safetensors")]
    if not all(path.exists() for path in files):
        pytest.skip("golden weights var_saln and vae_small are not there")
    pipe = load_model(var=files[0], vae=files[1])
    quantized = quantize(pipe, QuantConfig.preset("w4a4+paper"), method="rtn")
    loaded = load(save(quantized, tmp_path / "model"))
    assert loaded.var.arch.shared_adaln
    assert_same(quantized, loaded)


@pytest.mark.slow
def test_the_demo_model_comes_back(tmp_path: Path) -> None:
    quantized = quantize(load_model("demo"), QuantConfig.preset("w4a4+paper"), method="rtn")
    loaded = load(save(quantized, tmp_path / "model"))
    assert_same(quantized, loaded)
    assert loaded.runtime == "simulated"
    assert {m.codes.dtype for m in quant_linears(loaded.var).values()} == {torch.uint8}
    assert not any(p.requires_grad for p in loaded.var.parameters())
    assert all(m.float_weight is None for m in quant_linears(loaded.var).values())


def test_zero_points_that_are_no_codes_come_back(tmp_path: Path) -> None:
    config = QuantConfig.preset("w8a8+paper")
    weight = TensorSpec(num_bits=8, strategy="channel", range_rule="min_max")
    config = config.replace(linear=config.linear.replace(weight=weight))
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.var.head.weight.add_(10.0)
    quantized = quantize(pipe, config, method="rtn")
    assert float(quant_linears(quantized.var)["head"].zero_point.min()) < -255
    assert_same(quantized, load(save(quantized, tmp_path / "model")))


@given(
    out=st.integers(1, 37),
    width=st.sampled_from([1, 3, 37, 128, 130, 256]),
    bits=st.integers(2, 8),
    grouped=st.booleans(),
    rule=st.sampled_from(["with_zero", "min_max", "min_max_clamped"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_packing_a_layer_is_reversible(
    out: int, width: int, bits: int, grouped: bool, rule: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.utils.skip_init(torch.nn.Linear, width, out)
    values = torch.randn(out, width, generator=generator) + seed % 3
    layer.weight = torch.nn.Parameter(values)
    strategy = {"strategy": "group", "group_size": 128} if grouped else {"strategy": "channel"}
    spec = TensorSpec.from_dict({"num_bits": bits, "range_rule": rule, **strategy})
    linear = QuantLinear(layer, LinearSpec(weight=spec, input=None), "layer")
    unpacked = unpack_linear(linear, pack_linear(linear))
    for name, tensor in unpacked.items():
        assert torch.equal(tensor, getattr(linear, name)), name
        assert tensor.dtype == getattr(linear, name).dtype


def test_four_bits_lie_as_compressed_tensors_packs_them() -> None:
    """Golden words: eight codes an int32, first in the lowest nibble; zero points along `out`."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 9, 2, bias=False)
    layer.weight = torch.nn.Parameter(torch.zeros(2, 9))
    linear = QuantLinear(
        layer, LinearSpec(weight=TensorSpec(num_bits=4, strategy="channel"), input=None), "layer"
    )
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9], [0, 0, 0, 0, 0, 0, 0, 1, 0]])
    linear.load_codes(codes.to(torch.uint8), torch.ones(2, 1), torch.tensor([[3.0], [12.0]]))
    packed = pack_linear(linear)
    words = torch.tensor([[0xF7654321 - 2**32, 0x9], [0x10000000, 0]], dtype=torch.int32)
    assert torch.equal(packed["weight_packed"], words)
    assert torch.equal(packed["weight_zero_point"], torch.tensor([[0xC3]], dtype=torch.int32))
    assert packed["weight_shape"].tolist() == [2, 9]


def test_the_file_has_the_names_of_compressed_tensors(pristine: Path) -> None:
    with safe_open(pristine / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        packed = file.get_tensor("transformer.blocks.0.ffn.fc2.weight_packed")
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (128, 64))
    layer = "transformer.blocks.0.attn.proj."
    assert {n.removeprefix(layer) for n in names if n.startswith(layer)} == {
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias")
    }


def test_the_config_says_it_in_the_words_of_compressed_tensors(tmp_path: Path) -> None:
    folder = save(tiny_quantized("w4a8+paper+litevar"), tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    block = document["quantization_config"]
    assert (block["quant_method"], block["format"]) == ("compressed-tensors", "pack-quantized")
    assert block["ignore"] == ["transformer.blocks.0.ffn.fc2"]
    of_layer = {t: group for group in block["config_groups"].values() for t in group["targets"]}
    assert of_layer["transformer.head"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 128,
        "dynamic": False,
    }
    # Eight input channels do not make a group.
    assert of_layer["transformer.word_embed"]["weights"]["strategy"] == "channel"
    assert of_layer["transformer.head"]["input_activations"]["dynamic"] is True
    assert of_layer["transformer.head"]["input_activations"]["strategy"] == "token"
    assert QuantConfig.from_dict(document["varptq"]["config"]).name == "w4a8+paper+litevar"


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, pristine: Path) -> None:
    again = save(tiny_quantized(), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (pristine / name).read_bytes()


def test_a_loaded_model_saves_to_the_same_bytes(tmp_path: Path, pristine: Path) -> None:
    again = save(load(pristine), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (pristine / name).read_bytes()


def test_a_loaded_model_outlives_its_files(tmp_path: Path, quantized: QuantizedPipeline) -> None:
    folder = save(quantized, tmp_path / "model")
    loaded = load(folder)
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(b"\0" * size)
    assert_same(quantized, loaded)


def test_both_files_have_the_usual_permissions(tmp_path: Path, pristine: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    usual = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert [stat.S_IMODE(p.stat().st_mode) for p in pristine.iterdir()] == [usual] * 3


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'tiny': not quantized; quantize it"):
        save(tiny_pipeline(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_nan_is_refused_by_tensor(tmp_path: Path) -> None:
    quantized = tiny_quantized()
    with torch.no_grad():
        quantized.var.blocks[0].attn.proj.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"transformer\.blocks\.0\.attn\.proj\.bias"):
        save(quantized, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_replaced_by_force_only(
    tmp_path: Path, quantized: QuantizedPipeline
) -> None:
    folder = save(quantized, tmp_path / "model")
    other = tiny_quantized("w8a8+paper")
    with pytest.raises(OutputError) as error:
        save(other, folder)
    assert "\n" not in str(error.value) and "not empty" in str(error.value)
    assert load(folder).config == quantized.config
    assert load(save(other, folder, force=True)).config == other.config


@pytest.mark.parametrize("place", ["file", "file/model"])
def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, quantized: QuantizedPipeline, place: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError) as error:
        save(quantized, tmp_path / place)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


FAULTS = {
    "disk full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "ctrl-c": KeyboardInterrupt,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", ["save_file", "file_sha256", "packed_tensors", "_encoded"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_fault_while_saving_leaves_what_was_there(
    tmp_path: Path,
    pristine: Path,
    quantized: QuantizedPipeline,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    step: str,
    replaces: bool,
) -> None:
    folder = tmp_path / "model"
    if replaces:
        save(quantized, folder)

    def broken(*args: object) -> object:
        real(*args)
        raise FAULTS[fault]()

    module = sys.modules["varptq.artifact.save"]
    real = getattr(module, step)
    monkeypatch.setattr(module, step, broken)
    with pytest.raises((OutputError, KeyboardInterrupt)) as error:
        save(tiny_quantized("w8a8+paper"), folder, force=True)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == (["model"] if replaces else [])
    if replaces:
        assert load(folder).config == quantized.config
