"""The BOP account, the cost curve of shift-and-sum and theta against the reference."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from varptq.calibrate.theta import AttentionMass, overhead_curve, search_theta
from varptq.models.scales import Scales
from varptq.quant.bops import BopsAccount, LayerShape, ProductShape, account

CURVE_TOLERANCE = 1e-5  # relative; the reference sums in float32
PRODUCT_NAMES = {"matmul1": "query_key", "matmul2": "probability_value"}


@pytest.fixture(scope="module")
def data(golden):
    return golden.npz("d_bops.npz")


@pytest.fixture(scope="module")
def settings(data):
    return sorted({key.split(".")[0] for key in data if key.endswith(".total_bop")})


def widths(setting: str) -> tuple[int, int]:
    weight, activation = re.fullmatch(r"w(\d+)a(\d+)", setting).groups()
    return int(weight), int(activation)


def kind_of(name: str) -> str:
    return [word for word in name.split(".") if not word.isdigit()][-1]


def tokens(name: str, scales: Scales) -> int:
    """Tokens of an image that go through the released model's Linear of that name."""
    if kind_of(name) in ("ada_lin", "shared_ada_lin"):
        return scales.num_scales
    return scales.num_tokens - (scales.lengths[0] if name == "word_embed" else 0)


def our_account(golden, data, setting: str) -> BopsAccount:
    """The account of the golden model; sizes come from its float weights."""
    weights = golden.weights(str(golden.npz("e_resampling.npz")["var_file"]))
    scales = Scales(data["patch_nums"])
    w, a = widths(setting)
    layers, products = [], []
    for name in data[f"{setting}.module_names"].tolist():
        name = name.removeprefix("model.")
        if name.endswith("matmul1"):
            module = name.rpartition(".")[0]
            products.append(
                ProductShape(module, int(data["num_heads"]), int(data["head_dim"]), a, a, a, a)
            )
        elif not name.endswith("matmul2"):
            out, in_ = weights[f"{name}.weight"].shape
            layers.append(LayerShape(name, kind_of(name), out, in_, tokens(name, scales), w, a))
    return account(layers, products, scales)


def masses(data, setting: str) -> list[AttentionMass]:
    bits = widths(setting)[1]
    lengths = Scales(data["patch_nums"]).lengths
    found = []
    for key in data:
        match = re.fullmatch(rf"{setting}\.attn_mean\.block(\d+)\.scale(\d+)", key)
        if match:
            block, scale = map(int, match.groups())
            abar, c = torch.from_numpy(data[key]), int(data["head_dim"])
            order = int(data["max_log_tokens"])
            mass = AttentionMass(block, scale, lengths[scale], abar, c, bits, bits, order)
            found.append(mass)
    return found


def test_total_and_parts(golden, data, settings):
    for setting in settings:
        ours = our_account(golden, data, setting)
        assert ours.total == data[f"{setting}.total_bop"]
        names = data[f"{setting}.module_names"].tolist()
        for name, expected in zip(names, data[f"{setting}.module_bop"].tolist(), strict=True):
            head, _, last = name.removeprefix("model.").rpartition(".")
            key = f"{head}.{PRODUCT_NAMES.get(last, last)}" if head else last
            assert ours.by_layer()[key] == expected, name


def test_curve(data, settings):
    thetas = torch.from_numpy(data["thetas"])
    for setting in settings:
        ours = overhead_curve(masses(data, setting), thetas)
        np.testing.assert_allclose(ours, data[f"{setting}.curve"], rtol=CURVE_TOLERANCE)


def test_theta(data, settings):
    num_grid = int(data["n_grids"])
    for setting in settings:
        total = int(data[f"{setting}.total_bop"])
        for alpha, expected in zip(data["alphas"], data[f"{setting}.theta"], strict=True):
            ours = search_theta(masses(data, setting), total, float(alpha), num_grid)
            assert ours.status == "ok"
            # One step of the grid: the reference compares a float32 curve with the budget.
            assert abs(ours.theta - expected) <= 1.01 / num_grid
            assert ours.fraction <= alpha
