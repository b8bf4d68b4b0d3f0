"""Networks that other programs have wrapped or changed: the wrapper is taken off, or refused by
name.

`torch.compile(net)`, `DataParallel(net)` and averaged models hold the network itself, and the verbs
call its parts, not its `forward`: they work on what is inside. What is put between the layers
(compiled blocks, parametrizations, hooks, layers of others) would be lost by the walk that replaces
layers, or saved under names that nobody reads, so whoever walks asks first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from varptq.errors import InputError
from varptq.models.autoencoder import Autoencoder
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import Transformer

# Under which name a wrapper holds what it wraps: torch.compile, and all the others.
COMPILED, WRAPPED = "_orig_mod", "module"
OURS = ("varptq.", "torch.nn.modules.")
# Where the hooks are from that make a weight of others before every call.
NORMS = "torch.nn.utils."
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
PARTS = {"var": "transformer", "vae": "autoencoder"}

Some = TypeVar("Some", bound=Pipeline)
Network = TypeVar("Network", bound=nn.Module)


def bare(pipe: Some) -> Some:
    """The pipeline with the networks themselves: `pipe` where nothing is wrapped around them.

    Raises `InputError` for a network that is none of ours or is not where its partner is."""
    var = _inside(pipe.var, Transformer, f"model {pipe.name!r}: its transformer")
    vae = _inside(pipe.vae, Autoencoder, f"model {pipe.name!r}: its autoencoder")
    places = {var.device, vae.device}
    if any(place.type == "meta" for place in places):
        raise InputError(
            f"model {pipe.name!r}: is on the meta device, which holds no values; load it on 'cpu'"
        )
    if len(places) > 1:
        raise InputError(
            f"model {pipe.name!r}: its transformer is on {var.device} and its autoencoder is not; "
            "move both with pipe.to(device=...)"
        )
    same = var is pipe.var and vae is pipe.vae
    return pipe if same else replace(pipe, var=var, vae=vae)


def check_layers(pipe: Pipeline, *, hooks: bool = False) -> None:
    """Raises `InputError` naming the first layer of a bare pipeline that somebody has changed so
    that its tensors by name would not be the same model; with `hooks` also one that would lose its
    hooks where layers of the transformer are replaced."""
    for part, title in PARTS.items():
        network = getattr(pipe, part)
        # A family may live in a package of its own.
        ours = (*OURS, type(network).__module__)
        for name, module in network.named_modules():
            found = _change(module, ours, hooks=hooks and part == "var")
            if found:
                where = f"layer {name}" if name else title
                raise InputError(f"model {pipe.name!r}: its {where} {found}")


def _change(module: nn.Module, ours: tuple[str, ...], *, hooks: bool) -> str | None:
    """What somebody did to a layer and how to undo it."""
    kind = type(module)
    held = [name for name, _ in module.named_children()]
    if COMPILED in held or getattr(module, "_compiled_call_impl", None) is not None:
        return "is compiled (torch.compile); compile after quantizing, or load the model again"
    before, after = (vars(module).get(name, {}) for name in HOOKS)
    if is_parametrized(module) or any(
        type(hook).__module__.startswith(NORMS) for hook in before.values()
    ):
        return "has a computed weight (weight_norm or the like); remove that first"
    if not kind.__module__.startswith(ours):
        return f"is a {kind.__module__}.{kind.__name__}; load the model again, without it"
    if "forward" in vars(module):
        return "has a forward of another's; load the model again, without it"
    if hooks and (before or after):
        return "has forward hooks, which its quantized form would lose; remove them first"
    return None


def _inside(module: nn.Module, kind: type[Network], what: str) -> Network:
    inner = module
    while not isinstance(inner, kind):
        held = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
        found = held.get(COMPILED) or held.get(WRAPPED)
        if found is None:
            name = f"{type(module).__module__}.{type(module).__name__}"
            raise InputError(f"{what} is a {name}, expected the one that was loaded")
        inner = found
    return inner
