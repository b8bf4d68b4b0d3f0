"""Loading and building pipelines, labels by id and name, moving and casting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varptq.errors import CheckpointError, InputError
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline, build_model, load_model
from varptq.models.var.checkpoint import file_sha256
from varptq.models.var.vqvae import VQVAE

LABELS = [0, 1, 2, 3, 4]


def var_state(pipe: Pipeline) -> dict[str, Tensor]:
    """As upstream stores it: with the mask over all tokens."""
    level_L = pipe.var.lvl_1L[0]
    mask_LL = torch.where(level_L[:, None] >= level_L[None, :], 0.0, -torch.inf)
    return {**pipe.var.state_dict(), "attn_bias_for_masking": mask_LL[None, None].contiguous()}


def save_pair(pipe: Pipeline, folder: Path) -> dict[str, Path]:
    paths = {"var": folder / "var_tiny.safetensors", "vae": folder / "vae_tiny.safetensors"}
    save_file(var_state(pipe), paths["var"])
    save_file(dict(pipe.vae.state_dict()), paths["vae"])
    return paths


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_loaded_files_give_the_same_pipeline(any_tiny: Pipeline, tmp_path: Path) -> None:
    paths = save_pair(any_tiny, tmp_path)
    loaded = load_model(var=paths["var"], vae=str(paths["vae"]))
    assert loaded.name == "var_tiny" and loaded.class_names == ()
    assert loaded.var.arch == any_tiny.var.arch and loaded.vae.arch == any_tiny.vae.arch
    assert states_equal(loaded.var, any_tiny.var) and states_equal(loaded.vae, any_tiny.vae)
    assert loaded.sources == {part: file_sha256(path) for part, path in paths.items()}
    ours, theirs = generate(loaded, LABELS), generate(any_tiny, LABELS)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.images, theirs.images)


def test_a_trainer_checkpoint_holds_both_parts(tiny: Pipeline, tmp_path: Path) -> None:
    """Upstream's own layout: one file for both arguments, equal to the safetensors pair."""
    wrapped = tmp_path / "trainer.pth"
    parts = {"var_wo_ddp": var_state(tiny), "vae_local": tiny.vae.state_dict()}
    torch.save({"epoch": 3, "trainer": parts}, wrapped)
    bare = tmp_path / "var.pth"
    torch.save(var_state(tiny), bare)
    for var_path in (wrapped, bare):
        loaded = load_model(var=var_path, vae=wrapped)
        assert states_equal(loaded.var, tiny.var) and states_equal(loaded.vae, tiny.vae)


def test_loaded_models_are_frozen_and_in_eval_mode(tiny: Pipeline, tmp_path: Path) -> None:
    loaded = load_model(**save_pair(tiny, tmp_path))
    for network in (loaded.var, loaded.vae, build_model("demo").var):
        assert not network.training
        assert not any(p.requires_grad or p.is_meta for p in network.parameters())


def test_a_dtype_is_taken_at_loading(tiny: Pipeline, tmp_path: Path) -> None:
    loaded = load_model(**save_pair(tiny, tmp_path), dtype=torch.bfloat16)
    assert loaded.dtype == loaded.vae.quant_conv.weight.dtype == torch.bfloat16
    assert loaded.var.lvl_1L.dtype == torch.int64
    assert loaded.device == torch.device("cpu")


def test_half_precision_files_load_as_float32(tiny: Pipeline, tmp_path: Path) -> None:
    paths = save_pair(tiny, tmp_path)
    state = {n: t.half() if t.is_floating_point() else t for n, t in var_state(tiny).items()}
    save_file(state, paths["var"])
    loaded = load_model(**paths)
    assert all(p.dtype == torch.float32 for p in loaded.var.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a preset name, or both files"),
        ({"var": "v.pth"}, "give a preset name, or both files"),
        ({"vae": "v.pth"}, "give a preset name, or both files"),
        ({"name": "demo", "var": "v.pth"}, "model 'demo': give either a name or the two files"),
        ({"name": "demo", "vae": "v.pth"}, "model 'demo': give either a name or the two files"),
        ({"name": "dmo"}, "unknown model 'dmo': expected one of demo, .*did you mean 'demo'"),
    ],
)
def test_contradicting_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(**arguments)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tiny: Pipeline, tmp_path: Path) -> None:
    paths = save_pair(tiny, tmp_path)
    for part in paths:
        with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
            load_model(**{**paths, part: tmp_path / "nowhere.pth"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 31}, "codebook size is 32 in the VAR and 31 in the VQVAE"),
        ({"code_dim": 6}, "code width is 8 in the VAR and 6 in the VQVAE"),
    ],
)
def test_a_vqvae_of_another_model_is_refused(
    tiny: Pipeline, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    paths = save_pair(tiny, tmp_path)
    arch = type(tiny.vae.arch)(**{**vars(tiny.vae.arch), **change})
    other = VQVAE(arch, tiny.scales)
    other.randomize(torch.Generator().manual_seed(0))
    save_file(dict(other.state_dict()), paths["vae"])
    with pytest.raises(CheckpointError, match=message):
        load_model(**paths)


def test_exchanged_files_are_refused(tiny: Pipeline, tmp_path: Path) -> None:
    paths = save_pair(tiny, tmp_path)
    with pytest.raises(CheckpointError, match="is this a VAR checkpoint"):
        load_model(var=paths["vae"], vae=paths["var"])


def test_the_demo_model_loads_by_name() -> None:
    pipe = load_model("demo")
    assert pipe.name == "demo" and len(pipe.class_names) == pipe.var.arch.num_classes == 10
    assert generate(pipe, ["cat", 5], decode=False, top_k=1).tokens.shape == (2, 130)


def test_built_models_are_functions_of_name_and_seed() -> None:
    first, again, other = (build_model("demo", seed=seed) for seed in (4, 4, 5))
    assert states_equal(first.var, again.var) and states_equal(first.vae, again.vae)
    assert not torch.equal(first.var.head.weight, other.var.head.weight)
    assert not torch.equal(first.vae.quant_conv.weight, other.vae.quant_conv.weight)
    assert first.sources["var"] == "random, seed 4"
    assert first.class_names == load_model("demo").class_names
    assert first.var.arch == load_model("demo").var.arch


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model("demo")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_preset_cannot_be_built() -> None:
    with pytest.raises(InputError, match="unknown model 'var-d17': expected one of demo, var-d16"):
        build_model("var-d17")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 4], [0, 4]),
        (["ant", "eel"], [0, 4]),
        (["cat", 2, "3"], [2, 2, 3]),
        (("bee",), [1]),
        (range(3), [0, 1, 2]),
        (torch.tensor([3, 1]), [3, 1]),
        (np.array([3, 1]), [3, 1]),
        (iter([1, 2]), [1, 2]),
    ],
)
def test_labels_by_id_and_name(tiny: Pipeline, labels: Any, expected: list[int]) -> None:
    found = tiny.prompts(labels).labels_B
    assert found.dtype == torch.int64 and found.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels: empty; give at least one class"),
        (torch.tensor([]), "labels: empty"),
        ("cat", "labels: 'cat', expected a list"),
        (3, "labels: 3, expected a list"),
        (torch.tensor(3), "labels: 3, expected a list"),
        ([5], r"model 'tiny': class 5: not in 0\.\.4"),
        ([0, -1], r"class -1: not in 0\.\.4"),
        (["-1"], r"class -1: not in 0\.\.4"),
        ([10**30], r"not in 0\.\.4"),
        (["dgo"], "class 'dgo': unknown; did you mean dog"),
        (["xyz"], "class 'xyz': unknown; did you mean ant, bee, cat, dog, eel"),
        (["Cat\n"], r"class 'Cat\\n': unknown"),
        (["--1"], "class '--1': unknown"),
        (["²"], "class '²': unknown"),
        ([""], "class '': unknown"),
        ([True], "class True: expected an id or a name, got bool"),
        ([1.0], r"class 1\.0: expected an id or a name, got float"),
        ([None], "class None: expected an id or a name, got NoneType"),
        (torch.tensor([1.0]), "got float"),
        (torch.tensor([True]), "got bool"),
        (torch.tensor([[1, 2]]), "got list"),
    ],
)
def test_unusable_labels_are_named(tiny: Pipeline, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tiny.prompts(labels)
    assert "\n" not in str(caught.value)


def test_names_need_a_model_that_has_them(tiny: Pipeline) -> None:
    nameless = Pipeline(tiny.var, tiny.vae, "nameless")
    with pytest.raises(InputError, match="model 'nameless': class 'cat': there are no class names"):
        nameless.prompts(["cat"])


def test_moving_and_casting_happen_in_place(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny()
    assert pipe.to(device="cpu", dtype=torch.bfloat16) is pipe
    assert pipe.var.head.weight.dtype == pipe.vae.quant_conv.weight.dtype == torch.bfloat16
    assert pipe.var.lvl_1L.dtype == torch.int64
    assert pipe.to(dtype=torch.float32).dtype == torch.float32
