"""Parity of the VQVAE and the token pyramid with the reference implementation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from golden.recipe import check_values, recipe_state
from varptq.models.scales import Scales
from varptq.models.var.checkpoint import infer_vqvae, load_strict
from varptq.models.var.pyramid import phi_index
from varptq.models.var.vqvae import VQVAE

if TYPE_CHECKING:
    from golden.conftest import Golden

Arrays = dict[str, np.ndarray]

IMAGE_TOLERANCE = 1e-4  # float32 convolutions in another order
FEATURE_TOLERANCE = 1e-5  # a handful of float32 additions
RECIPE_CHECKED = (
    "quantize.embedding.weight",
    "encoder.conv_in.weight",
    "decoder.conv_out.weight",
    "quant_conv.weight",
)


def build(state: dict[str, Tensor], sides: np.ndarray) -> VQVAE:
    vae = VQVAE(infer_vqvae(state), Scales(sides.tolist()))
    load_strict(vae, state, "VQVAE")
    return vae.eval().requires_grad_(False)


def assert_close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=tolerance, rtol=0.0)


def assert_same_ids(found: Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.int64
    np.testing.assert_array_equal(found.numpy(), expected)


def partial_sums(vae: VQVAE, ids_BL: Tensor) -> Tensor:
    """f_hat after every scale, (K, B, Cvae, P, P)."""
    return torch.stack([vae.quantize.accumulate(ids_BL[:, :end]) for end in vae.scales.ends])


@pytest.fixture
def arrays(golden: Golden, a_file: str) -> Arrays:
    return golden.npz(a_file)


@pytest.fixture
def vae(golden: Golden, arrays: Arrays) -> VQVAE:
    return build(golden.weights(str(arrays["vae_file"])), arrays["patch_nums"])


def test_architecture_is_read_off_the_tensors(vae: VQVAE, arrays: Arrays) -> None:
    assert vae.arch.ch == arrays["ch"]
    assert vae.arch.ch_mult == tuple(arrays["ch_mult"])
    assert vae.arch.codebook_size == arrays["V"]
    assert vae.arch.code_dim == arrays["Cvae"]
    assert vae.image_size == (int(arrays["image_size"]),) * 2


def test_phi_index(vae: VQVAE, arrays: Arrays) -> None:
    assert vae.quantize.phi_of_scale == tuple(arrays["phi_index"])


def test_features(vae: VQVAE, arrays: Arrays) -> None:
    features = vae.features(torch.from_numpy(arrays["vae_images"]))
    assert_close(features, arrays["vae_features"], IMAGE_TOLERANCE)


def test_encode(vae: VQVAE, arrays: Arrays) -> None:
    assert_same_ids(vae.encode(torch.from_numpy(arrays["vae_images"])), arrays["vae_ids"])
    features = torch.from_numpy(arrays["vae_features"])
    assert_same_ids(vae.quantize.encode(features), arrays["vae_ids"])


@pytest.mark.parametrize(("ids", "f_hat"), [("vae_ids", "vae_fhat"), ("ids", "fhat")])
def test_partial_sums(vae: VQVAE, arrays: Arrays, ids: str, f_hat: str) -> None:
    sums = partial_sums(vae, torch.from_numpy(arrays[ids]))
    assert_close(sums, arrays[f_hat], FEATURE_TOLERANCE)


@pytest.mark.parametrize(
    ("ids", "inputs"),
    [("vae_ids", "vae_var_inputs"), ("ids", "tf_inputs"), ("ids", "next_inputs")],
)
def test_teacher_inputs(vae: VQVAE, arrays: Arrays, ids: str, inputs: str) -> None:
    found = vae.teacher_inputs(torch.from_numpy(arrays[ids]))
    assert_close(found, arrays[inputs], FEATURE_TOLERANCE)


def test_decode(vae: VQVAE, arrays: Arrays) -> None:
    recon = vae.decode(torch.from_numpy(arrays["vae_ids"]))
    assert_close(recon, arrays["vae_recon"], IMAGE_TOLERANCE)
    image = (vae.decode(torch.from_numpy(arrays["ids"])) + 1) / 2
    assert_close(image, arrays["image"], IMAGE_TOLERANCE)


def test_decode_of_the_first_scales(vae: VQVAE, arrays: Arrays) -> None:
    first_two = torch.from_numpy(arrays["vae_ids"])[:1, : vae.scales.ends[1]]
    assert_close(vae.decode(first_two), arrays["vae_recon_scale1"], IMAGE_TOLERANCE)


def test_sum_of_edited_ids(vae: VQVAE, arrays: Arrays) -> None:
    if "edit_mixed_ids" not in arrays:
        pytest.skip("this file has no edit arrays")
    f_hat = vae.quantize.accumulate(torch.from_numpy(arrays["edit_mixed_ids"])[:1])
    assert_close(f_hat, arrays["edit_fhat"], FEATURE_TOLERANCE)


@pytest.fixture(scope="module")
def recipe(golden: Golden) -> Arrays:
    return golden.npz("h_recipe_vae.npz")


@pytest.fixture(scope="module")
def recipe_weights(recipe: Arrays) -> dict[str, Tensor]:
    return recipe_state(recipe)


def test_recipe_fill(recipe: Arrays, recipe_weights: dict[str, Tensor]) -> None:
    found = check_values(recipe_weights, list(RECIPE_CHECKED))
    np.testing.assert_array_equal(found, recipe["check_values"])


def test_recipe_of_the_released_layout(recipe: Arrays, recipe_weights: dict[str, Tensor]) -> None:
    vae = build(recipe_weights, recipe["patch_nums"])
    arch = dataclasses.asdict(vae.arch)
    assert arch["ch"] == recipe["ch"]
    assert arch["ch_mult"] == tuple(recipe["ch_mult"])
    images = torch.from_numpy(recipe["vae_images"])
    assert_close(vae.features(images), recipe["vae_features"], IMAGE_TOLERANCE)
    assert_same_ids(vae.encode(images), recipe["vae_ids"])
    # Unlike the images of the a_ files this one is in [-1, 1].
    assert_close(vae.decode(torch.from_numpy(recipe["ids"])), recipe["image"], IMAGE_TOLERANCE)


@pytest.mark.parametrize("pixels", ["256", "512"])
def test_pyramid_of_the_released_sides(
    recipe: Arrays, recipe_weights: dict[str, Tensor], pixels: str
) -> None:
    vae = build(recipe_weights, recipe[f"patch_nums_{pixels}"])
    assert vae.image_size == (int(pixels),) * 2
    assert vae.quantize.phi_of_scale == tuple(recipe[f"phi_index_{pixels}"])
    ids = torch.from_numpy(recipe[f"ids_{pixels}"])
    inputs = recipe[f"var_inputs_{pixels}_ch0_3"]
    assert_close(vae.teacher_inputs(ids)[..., : inputs.shape[-1]], inputs, FEATURE_TOLERANCE)
    f_hat = recipe[f"fhat_{pixels}_ch0_3"]
    assert_close(vae.quantize.accumulate(ids)[:, : f_hat.shape[1]], f_hat, FEATURE_TOLERANCE)


def test_phi_table(recipe: Arrays, recipe_weights: dict[str, Tensor]) -> None:
    num_phi = infer_vqvae(recipe_weights).num_phi
    for num_scales, row in enumerate(recipe["phi_table"], start=2):
        assert phi_index(num_scales, num_phi) == tuple(row[row >= 0])
