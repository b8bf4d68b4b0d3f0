"""Models that other programs have wrapped, compiled or hooked: the same result, or a refusal that
names the layer before anything is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel

import varptq
from varptq import Pipeline, QuantConfig
from varptq.analyze.analyze import analyze
from varptq.errors import InputError
from varptq.evaluate.sampling import describe, sample_set
from varptq.evaluate.tokens import token_fidelity
from varptq.models.sampling import SamplingSettings

CONFIG = QuantConfig.preset("w8a8+paper").replace(rules=())
PICTURE = Image.new("RGB", (32, 32), "red")


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled DataParallel": lambda module: compiled(nn.DataParallel(module)),
}


@pytest.fixture
def model(make_tiny: Callable[..., Pipeline]) -> Pipeline:
    return make_tiny(depth=1)


def saved(pipe: Pipeline, folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in varptq.save(pipe, folder).iterdir()}


@pytest.mark.slow
def test_a_wrapped_network_is_taken_out(
    model: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    plain = varptq.quantize(model, CONFIG, method="rtn")
    expected = saved(plain, tmp_path / "plain")
    tokens = varptq.generate(model, [1, 2], seed=3).tokens
    edited = varptq.edit(model, PICTURE, box=(0, 0, 0.5, 1)).tokens
    samples = describe(model, SamplingSettings(), 0, 2)
    for name, wrap in WRAPPERS.items():
        counted()
        wrapped = copy.copy(model)
        wrapped.var, wrapped.vae = wrap(model.var), wrap(model.vae)
        made = varptq.quantize(wrapped, CONFIG, method="rtn")
        made.var = wrap(made.var)
        assert saved(made, tmp_path / name) == expected, name
        assert torch.equal(varptq.generate(wrapped, [1, 2], seed=3).tokens, tokens), name
        assert torch.equal(varptq.edit(wrapped, PICTURE, box=(0, 0, 0.5, 1)).tokens, edited), name
        assert sample_set(wrapped, tmp_path / f"{name} set", count=2).identity["seed"] == 0
        fidelity = token_fidelity(wrapped, made, [1, 2], tokens)
        assert fidelity == token_fidelity(model, plain, [1, 2], tokens), name
    assert describe(model, SamplingSettings(), 0, 2) == samples


@pytest.mark.slow
def test_training_mode_and_gradients_change_nothing(
    model: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    calibration = varptq.CalibrationConfig(num_samples=2, steps=2, tune_steps=1, batch_size=2)
    plain = varptq.quantize(model, CONFIG, method="brecq", calibration=calibration)
    expected = saved(plain, tmp_path / "plain")
    for network in (model.var, model.vae):
        counted()
        network.train().requires_grad_(True)
    made = varptq.quantize(model, CONFIG, method="brecq", calibration=calibration)
    assert saved(made, tmp_path / "trained") == expected
    assert all(parameter.grad is None for parameter in model.var.parameters())


class Adapter(nn.Linear):
    """A layer of somebody's own."""


def put(path: str, change: Callable[[nn.Module], Any]) -> Callable[[Pipeline], None]:
    """Replace the module at `path` of a pipeline by what `change` makes of it."""

    def apply(pipe: Pipeline) -> None:
        parent: Any = pipe
        *above, last = path.split(".")
        for name in above:
            parent = getattr(parent, name)
        setattr(parent, last, change(getattr(parent, last)))

    return apply


def on(path: str, change: Callable[[Any], object]) -> Callable[[Pipeline], None]:
    """Change the module at `path` in place."""

    def apply(pipe: Pipeline) -> None:
        part, _, name = path.partition(".")
        change(getattr(pipe, part).get_submodule(name))

    return apply


def patch_forward(module: Any) -> None:
    module.forward = lambda *arguments: type(module).forward(module, *arguments)


def adapted(linear: Any) -> nn.Module:
    return Adapter(linear.in_features, linear.out_features, dtype=torch.float32)


FC1 = "var.blocks.0.ffn.fc1"
CHANGES: dict[str, tuple[Callable[[Pipeline], None], str]] = {
    "compiled in place": (on("var", lambda m: m.compile(backend="eager")), "transformer is comp"),
    "compiled block": (put("var.blocks.0", compiled), "layer blocks.0 is compiled"),
    "compiled decoder": (put("vae.decoder", compiled), "layer decoder is compiled"),
    "weight_norm": (on(FC1, parametrizations.weight_norm), "fc1 has a computed weight"),
    "old weight_norm": (on(FC1, old_weight_norm), "fc1 has a computed weight"),
    "hook": (on(FC1, lambda m: m.register_forward_hook(print)), "fc1 has forward hooks"),
    "pre-hook": (on("var", lambda m: m.register_forward_pre_hook(print)), "has forward hooks"),
    "adapter": (put(FC1, adapted), "Adapter; load the model again"),
    "patched forward": (on(FC1, patch_forward), "fc1 has a forward of another's"),
}
UNUSABLE: dict[str, tuple[Callable[[Pipeline], None], str]] = {
    "meta device": (on("var", lambda m: m.to("meta")), "on the meta device"),
    "VQVAE on meta": (on("vae", lambda m: m.to("meta")), "on the meta device"),
    "another network": (put("var", lambda _: nn.Linear(2, 2)), "expected the one that was loaded"),
    "scripted": (
        put("vae", lambda _: torch.jit.trace(nn.Identity(), torch.zeros(1))),
        "expected the one that was loaded",
    ),
}


def never(*_: object) -> None:
    raise AssertionError("computed something")


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_quantized_is_named_before_calibrating(
    make_tiny: Callable[..., Pipeline], counted: Callable[[], None]
) -> None:
    for change, message in (CHANGES | UNUSABLE).values():
        counted()
        pipe = make_tiny(depth=1)
        change(pipe)
        refused(lambda pipe=pipe: varptq.quantize(pipe, CONFIG, progress=never), message)
        refused(lambda pipe=pipe: analyze(pipe, CONFIG, progress=never), message)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_drawn_or_saved_is_named(
    model: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    for change, message in UNUSABLE.values():
        counted()
        pipe = copy.deepcopy(model)
        change(pipe)
        refused(lambda pipe=pipe: varptq.generate(pipe, [1]), message)
        refused(lambda pipe=pipe: varptq.edit(pipe, PICTURE, box=(0, 0, 0.5, 1)), message)
    made = varptq.quantize(model, CONFIG, method="rtn")
    made.vae.decoder = compiled(made.vae.decoder)
    refused(lambda: varptq.save(made, tmp_path / "artifact"), "layer decoder is compiled")
    assert not (tmp_path / "artifact").exists()


def test_a_loaded_model_moved_to_nowhere_is_refused(
    model: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """The native core would read address zero."""
    varptq.save(varptq.quantize(model, QuantConfig.preset("w4a4"), method="rtn"), tmp_path / "a")
    for runtime in ("cpu", "reference", "simulated"):
        counted()
        loaded = varptq.load(tmp_path / "a", runtime=runtime)
        loaded.var.to("meta")
        refused(lambda loaded=loaded: varptq.generate(loaded, [1]), "on the meta device")
