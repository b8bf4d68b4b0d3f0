"""The converted model against the released code: which quantizer where, every op on given inputs,
end to end."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from golden.conftest import Golden
from varptq.models.generate import ScaleEvent, generate
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.seams import Span
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears, set_theta
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline

# golden README, "Tolerances", f.
OP, FIRST_SCALE, MEAN_FLOOR = 2e-4, 1e-3, 2e-3
FILE = "f_quantized_forward.npz"
WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")


@pytest.fixture(scope="module")
def data(golden: Golden) -> dict[str, np.ndarray]:
    return golden.npz(FILE)


@pytest.fixture(scope="module")
def pipe(golden: Golden, data: dict[str, np.ndarray]) -> Pipeline:
    return load_model(
        var=golden.path(str(data["var_file"])), vae=golden.path(str(data["vae_file"]))
    )


def quantized(pipe: Pipeline, width: str, theta: float | None) -> QuantizedPipeline:
    """Nearest rounding with ranges as the released code takes them."""
    config = QuantConfig.preset(f"{width}+paper+released")
    model = convert(pipe.var, config)
    set_theta(model, theta)
    return QuantizedPipeline(model, pipe.vae, pipe.name, config=config, method="rtn", theta=theta)


def settings(data: dict[str, np.ndarray]) -> list[tuple[str, int]]:
    found = [re.fullmatch(r"(w\da\d)\.theta(\d)\.guided", key) for key in data]
    return [(match[1], int(match[2])) for match in found if match]


def guided_logits(model: Pipeline, data: dict[str, np.ndarray], width: str) -> Tensor:
    logits = torch.empty(data[f"{width}.float_guided"].shape)
    slices = model.scales.slices()

    def keep(event: ScaleEvent) -> None:
        logits[event.rows, slices[event.scale]] = event.logits_BlV

    generate(
        model,
        data[f"{width}.labels"].tolist(),
        cfg=float(data["cfg"]),
        top_k=0,
        top_p=0,
        forced=torch.from_numpy(data[f"{width}.ids"]),
        on_scale=keep,
        decode=False,
    )
    return logits


def test_every_linear_and_product_is_quantized(pipe: Pipeline, data: dict[str, np.ndarray]) -> None:
    ours = set(quant_linears(quantized(pipe, "w4a4", None).var))
    theirs = {str(name) for name in data["quantized_modules"] if "matmul" not in str(name)}
    assert ours == theirs


@pytest.mark.parametrize("width", WIDTHS)
def test_inventory_of_quantizers(pipe: Pipeline, data: dict[str, np.ndarray], width: str) -> None:
    """Granularity of every weight and input matches the released code's choice."""
    if f"inventory.{width}" not in data:
        pytest.skip(f"{FILE} has no inventory of {width}")
    linears = quant_linears(quantized(pipe, width, None).var)
    for line in data[f"inventory.{width}"]:
        name, kind, _, weight, *inputs = (part.strip() for part in str(line).split("|"))
        if kind != "linear":
            continue
        layer = linears[name]
        assert layer.spec.weight is not None and layer.spec.input is not None
        grouped = layer.codes_grouped.shape[1] > 1 or "GroupAffine" in weight
        assert grouped == ("GroupAffine" in weight), name
        assert (layer.input_group is not None) == ("PerGroup" in inputs[0]), name
        assert (layer.spec.input.type == "sign_split") == ("sign-split" in inputs[0]), name
        assert f"bits={layer.spec.weight.num_bits}" in weight


def test_ops_on_given_inputs(pipe: Pipeline, data: dict[str, np.ndarray]) -> None:
    """Each recorded op, from its float inputs, within the tolerance of one op."""
    checked = 0
    for width, index in settings(data):
        model = quantized(pipe, width, float(data["thetas"][index])).var
        prefix = f"{width}.theta{index}.mod."
        for key in [k for k in data if k.startswith(prefix) and k.endswith(".out")]:
            name = key[len(prefix) : -len(".out")]
            ours = run_op(model, name, data, prefix + name)
            theirs = torch.from_numpy(data[key])
            assert float((ours - theirs).abs().max()) <= OP, (width, index, name)
            checked += 1
    assert checked or not settings(data)


def run_op(model: torch.nn.Module, name: str, data: dict[str, np.ndarray], key: str) -> Tensor:
    parent = name.rpartition(".")[0]
    if name.endswith("matmul1"):
        q, kT = torch.from_numpy(data[key + ".A"]), torch.from_numpy(data[key + ".B"])
        k, span = kT.transpose(-1, -2).contiguous(), Span(slice(0, q.shape[2]), (kT.shape[-1],))
        return model.get_submodule(f"{parent}.scores")(q, k, span)
    if name.endswith("matmul2"):
        mix = model.get_submodule(f"{parent}.mix")
        p, v = torch.from_numpy(data[key + ".A"]), torch.from_numpy(data[key + ".B"])
        return mix(p, v, Span(slice(0, p.shape[2]), (v.shape[2],)))
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    out = layer(torch.from_numpy(data[key + ".in"]))
    if name.endswith("mat_qkv"):
        attn = model.get_submodule(parent)
        out = out + torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))
    return out


def test_shift_and_sum_orders(pipe: Pipeline, data: dict[str, np.ndarray]) -> None:
    from varptq.quant.shift_sum import orders

    for width, index in settings(data):
        prefix = f"{width}.theta{index}.mod."
        for key in [k for k in data if k.startswith(prefix) and k.endswith(".order")]:
            p = torch.from_numpy(data[key.replace(".order", ".A")])
            ours = orders(p.mean(dim=-2), float(data["thetas"][index]))
            assert np.array_equal(ours.numpy(), data[key]), key


def test_end_to_end(pipe: Pipeline, data: dict[str, np.ndarray]) -> None:
    """Scale 0 tightly; later scales within what float noise alone does to the reference."""
    for width, index in settings(data):
        model = quantized(pipe, width, float(data["thetas"][index]))
        ours = guided_logits(model, data, width).numpy()
        key = f"{width}.theta{index}"
        theirs, reference = data[f"{key}.guided"], data[f"{width}.float_guided"]
        first = slice(0, pipe.scales.ends[0])
        assert np.abs(ours[:, first] - theirs[:, first]).max() <= FIRST_SCALE, key
        if width == "w4a4":
            relative = [np.linalg.norm(x - reference) for x in (ours, theirs)]
            assert abs(relative[0] - relative[1]) <= 0.1 * np.linalg.norm(reference), key
        else:
            bound = max(MEAN_FLOOR, 3 * float(data[f"{key}.noise_mean"]))
            assert np.abs(ours - theirs).mean() <= bound, key
