"""Folds leave the function of the model as it is: float64, random biases and modulation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from varptq.models.scales import Scales
from varptq.models.seams import GainFold, NormFold, ValueFold
from varptq.models.var.checkpoint import VARArch
from varptq.models.var.transformer import VAR
from varptq.quant.folds import scale, scale_input, scale_values, shift_input

WIDTH = 24
# Of a few thousand float64 roundings at magnitude 1.
TOLERANCE = 1e-10


def model(l2_norm: bool = True, shared: bool = False) -> VAR:
    """A model no tensor of which is zero, in float64."""
    arch = VARArch(3, 2, WIDTH, 3, Scales((1, 2, 3)), 11, 5, l2_norm, shared)
    var = VAR(arch).double().eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in (*var.parameters(), *var.buffers()):
        if tensor.is_floating_point():
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator).double()
    return var


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def logits(var: VAR) -> Tensor:
    inputs = noise(2, var.scales.num_tokens - 1, var.arch.code_dim, seed=7)
    with torch.no_grad():
        return var(torch.tensor([0, 3]), inputs)


def normed_inputs(var: VAR) -> dict[str, NormFold]:
    return {name: fold for name, fold in var.folds().items() if isinstance(fold, NormFold)}


def factors(seed: int) -> Tensor:
    """Log-normal, so that they range over a factor of a hundred."""
    return noise(WIDTH, seed=seed).exp()


def scale_all(var: VAR) -> None:
    for seed, place in enumerate(normed_inputs(var).values()):
        scale_input(place, factors(seed))


def shift_all(var: VAR) -> None:
    for seed, place in enumerate(normed_inputs(var).values()):
        shift_input(place, 8 * noise(WIDTH, seed=seed))


def scale_all_values(var: VAR) -> None:
    mixed = (fold for fold in var.folds().values() if isinstance(fold, ValueFold))
    for seed, place in enumerate(mixed):
        scale_values(place, factors(seed))


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("fold", [scale_all, shift_all, scale_all_values])
def test_the_function_stays(fold: Callable[[VAR], None], l2_norm: bool) -> None:
    var = model(l2_norm)
    changed = copy.deepcopy(var)
    fold(changed)
    assert any(
        not torch.equal(a, b) for a, b in zip(var.parameters(), changed.parameters(), strict=True)
    )
    torch.testing.assert_close(logits(changed), logits(var), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("fold", ["scale", "shift"])
def test_the_input_of_the_layer_changes_as_said(fold: str) -> None:
    var = model()
    changed, d_C = copy.deepcopy(var), factors(3)
    seen: dict[str, list[Tensor]] = {}
    for which in (var, changed):
        for name in normed_inputs(which):
            keep = seen.setdefault(name, [])
            layer = which.get_submodule(name)
            layer.register_forward_pre_hook(
                lambda _, arguments, keep=keep: keep.append(arguments[0])
            )
    for place in normed_inputs(changed).values():
        (scale_input if fold == "scale" else shift_input)(place, d_C)
    logits(var), logits(changed)
    for before, after in seen.values():
        expected = before * d_C if fold == "scale" else before + d_C
        torch.testing.assert_close(after, expected, rtol=1e-8, atol=1e-8)


def test_a_shared_adaln_layer_leaves_it_to_gains() -> None:
    var = model(shared=True)
    assert set(normed_inputs(var)) == {"head"}
    gains = [name for name, fold in var.folds().items() if isinstance(fold, GainFold)]
    assert gains == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.mat_qkv", "ffn.fc1")]
    assert not any("gain" in name for name in var.state_dict())
    before, heard = logits(var), {}
    for name in gains:
        var.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: heard.setdefault(name, []).append(arguments[0])
        )
    logits(var)
    for repetition in range(2):  # a gain that is there is multiplied
        for seed, place in enumerate(var.folds().values()):
            scale(place, factors(seed))
        torch.testing.assert_close(logits(var), before, rtol=TOLERANCE, atol=TOLERANCE)
        for name in gains:
            factor = factors(list(var.folds()).index(name)) ** (repetition + 1)
            expected = heard[name][0] * factor
            torch.testing.assert_close(heard[name][-1], expected, rtol=1e-8, atol=1e-8)
    assert {tuple(block.ada_gain.weight.shape) for block in var.blocks} == {(2, WIDTH)}


def test_folds_are_named_after_their_linears() -> None:
    var = model()
    folds = var.folds()
    assert all(var.get_submodule(name) is fold.consumer for name, fold in folds.items())
    block = [f"blocks.0.{name}" for name in ("attn.mat_qkv", "ffn.fc1", "attn.proj")]
    assert [*folds][:3] == block and [*folds][-1] == "head" and len(folds) == 7


@pytest.mark.parametrize("shared", [True, False])
def test_a_feed_hands_its_output_to_that_linear_alone(shared: bool) -> None:
    var, heard = model(shared=shared), {}
    for linear, source in var.feeds().items():
        made = heard.setdefault(linear, {})
        var.get_submodule(source).register_forward_hook(
            lambda _, __, output, made=made: made.update(made=output)
        )
        var.get_submodule(linear).register_forward_pre_hook(
            lambda _, arguments, made=made: made.update(read=arguments[0])
        )
    logits(var)
    assert len(heard) == 7 and all(made["made"] is made["read"] for made in heard.values())
