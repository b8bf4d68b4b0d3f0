"""Parity of Infinity's autoencoder and pyramid of bits with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from golden.conftest import Golden
from golden.infinity_cases import IMAGE, SUM, Arrays, Case, close
from golden.recipe import check_values, recipe_state
from varptq.models.infinity.bsqvae import BSQVAE
from varptq.models.infinity.checkpoint import infer_bsqvae, plain_names
from varptq.models.scales import Scales
from varptq.models.tensors import load_strict


@pytest.fixture(scope="module")
def case(golden_infinity: Golden, case_file: str) -> Case:
    return Case.load(golden_infinity, case_file)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_given_bits(case: Case) -> None:
    close(case.vae.teacher_inputs(case.bits), case.data["inputs"], SUM)
    close(case.vae.accumulate(case.bits), case.data["codes"], SUM)
    close(case.vae.decode(case.bits), case.data["image"], IMAGE)
    assert case.vae.image_size == case.data["image"].shape[-2:]


def test_images(case: Case) -> None:
    images, data, vae = torch.from_numpy(case.data["vae.images"]), case.data, case.vae
    close(vae.features(images), data["vae.features"], IMAGE)
    bits = vae.encode(images)
    assert torch.equal(bits, torch.from_numpy(data["vae.bits"]).long())
    close(vae.teacher_inputs(bits), data["vae.inputs"], SUM)
    close(vae.accumulate(bits), data["vae.codes"], SUM)
    close(vae.decode(bits), data["vae.decoded"], IMAGE)


def recipe_vae(data: Arrays, state: dict[str, Tensor]) -> BSQVAE:
    state = plain_names(state)
    arch = infer_bsqvae(state, int(data["latent_bits"]))
    vae = BSQVAE(arch, Scales(data["scales"].tolist()))
    load_strict(vae, state, "recipe")
    return vae.eval()


def test_released_levels_by_recipe(golden_infinity: Golden, recipe_file: str) -> None:
    data = golden_infinity.npz(recipe_file)
    state = recipe_state(data)
    found = check_values(state, data["check_names"].tolist())
    np.testing.assert_array_equal(found, data["check_values"])
    vae = recipe_vae(data, state)
    assert (vae.arch.ch, vae.arch.ch_mult) == (data["ch"], tuple(data["ch_mult"]))
    assert vae.arch.num_res_blocks == data["num_res_blocks"]
    assert vae.arch.downsampling == data["vae_patch"]
    images = torch.from_numpy(data["images"])
    close(vae.features(images), data["features"], IMAGE)
    bits = vae.encode(images)
    assert torch.equal(bits, torch.from_numpy(data["bits"]).long())
    close(vae.accumulate(bits), data["codes"], SUM)
    decoded = vae.decode(bits)
    close(decoded[:, :, ::2, ::2], data["decoded_every_2nd"], IMAGE)
    close(decoded.mean((2, 3)), data["decoded_mean"], IMAGE)
    close(decoded.abs().mean((2, 3)), data["decoded_absmean"], IMAGE)
