"""Finds the state dict of a network in a checkpoint and takes wrappers off the names of its
tensors.

Training code puts state dicts into dicts ("model", "state_dict", upstream's "trainer") and modules
into modules ("module.", "_orig_mod.", "var."). A transformer and a VQVAE are known by one tensor
each, which shows where they lie and what stands before their names. What is there once is taken;
two of a kind, say trained weights and their average, are a choice that is left to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from varptq.errors import CheckpointError

Part = Literal["var", "vae", "infinity", "bsqvae"]


class Network(NamedTuple):
    """A kind of network as checkpoints have it.

    anchors: tensors, one of which every network of the kind has and no other. trainer: what
    upstream's trainer calls it. argument: what it is given as. usual: keys under which the one that
    is meant lies where there are more.
    """

    name: str
    kind: str
    anchors: tuple[str, ...]
    other: Part
    trainer: str
    argument: Literal["var", "vae"]
    usual: tuple[str, ...] | None = None


CONV_IN = ("decoder.conv_in.conv.weight", "decoder.conv_in.weight")
NETWORKS: dict[Part, Network] = {
    "var": Network("VAR transformer", "VAR", ("pos_1LC",), "vae", "var_wo_ddp", "var"),
    "vae": Network("VQVAE", "VQVAE", ("quantize.embedding.weight",), "var", "vae_local", "vae"),
    "infinity": Network(
        "Infinity transformer", "Infinity", ("cfg_uncond",), "bsqvae", "gpt_fsdp", "var"
    ),
    "bsqvae": Network("BSQ-VAE", "BSQ-VAE", CONV_IN, "infinity", "vae_local", "vae", ("vae",)),
}
VAE_MODULES = ("encoder", "decoder", "quantize", "quantizer", "quant_conv", "post_quant_conv")
# Names that wrappers put into a module's path, at its beginning or before any of its parts.
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
VOWELS = "AEIOU"
OPTIMIZER = re.compile(r"(?:^|_)opt(?:im\w*)?(?:$|_)")
MAX_DEPTH = 5


class Place(NamedTuple):
    """Where a network lies: the keys that lead to its dict, and what stands before its names."""

    keys: tuple[str, ...]
    prefix: tuple[str, ...]
    tensors: Mapping[str, Any]

    @property
    def label(self) -> str:
        return repr(".".join((*self.keys, *self.prefix)))

    @property
    def remedy(self) -> str:
        """The expression that leaves this network alone of what torch.load gives as `content`."""
        inner = "content" + "".join(f"[{key!r}]" for key in self.keys)
        if not self.prefix:
            return inner
        start = ".".join(self.prefix) + "."
        return f"{{k: v for k, v in {inner}.items() if k.startswith({start!r})}}"


def select(content: Any, part: Part | None, path: Path) -> Any:
    """The state dict of `part` in what a file holds, by the names the network gives its tensors.

    A lone state dict is taken out of its dicts even where the network is not known, as with part
    None. Raises `CheckpointError` where there are two, or only the other part.
    """
    if part is None or not isinstance(content, Mapping):
        return _innermost(content)
    network = NETWORKS[part]
    other = NETWORKS[network.other]
    found = list(_places(content, network.anchors))
    usual = [place for place in found if place.keys == network.usual]
    found = usual if len(usual) == 1 else found
    if len(found) > 1:
        labels = " and ".join(place.label for place in found)
        raise CheckpointError(
            f"{path}: holds {len(found)} of {network.name}, {labels}: save the one that is meant, "
            f'e.g. torch.save({found[-1].remedy}, "{network.argument}.pth")'
        )
    others = list(_places(content, other.anchors))
    if found:
        return _named(found[0], part, others, path)
    if others:
        article = "an" if other.name[0] in VOWELS else "a"
        labels = " and ".join(place.label for place in others if place.keys or place.prefix)
        raise CheckpointError(
            f"{path}: holds {article} {other.name}{labels and f' under {labels}'} and no "
            f"{network.name} ({network.trainer!r} in files of its trainer), is this a "
            f"{network.kind} checkpoint? Give it as {other.argument}="
        )
    return _innermost(content)


def _innermost(content: Any) -> Any:
    """Inside a dict without tensors: its "state_dict", or the only dict in it."""
    while isinstance(content, Mapping):
        inner = [value for value in content.values() if isinstance(value, Mapping)]
        if isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        elif len(inner) == 1 and not any(isinstance(v, Tensor) for v in content.values()):
            content = inner[0]
        else:
            break
    return content


def holds(content: Any, part: Part) -> bool:
    """Whether a network of this kind is in what a file holds."""
    found = isinstance(content, Mapping) and _places(content, NETWORKS[part].anchors)
    return bool(found) and any(True for _ in found)


def _places(content: Mapping[Any, Any], anchors: Sequence[str]) -> Iterator[Place]:
    """Every place of a network with one of these tensors; one dict that is there twice counts
    once."""
    seen: set[int] = set()

    def walk(content: Mapping[Any, Any], keys: tuple[str, ...]) -> Iterator[Place]:
        if id(content) in seen:
            return
        seen.add(id(content))
        for name, value in content.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, Tensor):
                prefixes = [_prefix(name, anchor) for anchor in anchors]
                yield from (
                    Place(keys, prefix, content) for prefix in prefixes if prefix is not None
                )
            # Moments of an optimizer bear the names of the tensors they belong to.
            elif (
                isinstance(value, Mapping) and not OPTIMIZER.search(name) and len(keys) < MAX_DEPTH
            ):
                yield from walk(value, (*keys, name))

    return walk(content, ())


def _prefix(name: str, anchor: str) -> tuple[str, ...] | None:
    """What stands before `anchor` in a name that ends with it, wrappers within it passed over."""
    parts = name.split(".")
    for wanted in reversed(anchor.split(".")):
        while parts and parts[-1] in WRAPPERS:
            parts.pop()
        if not parts or parts.pop() != wanted:
            return None
    return tuple(parts)


def _named(place: Place, part: Part, others: list[Place], path: Path) -> dict[str, Any]:
    """The tensors of a place by their names in the network, those of another network left out."""
    inside = [other.prefix for other in others if other.tensors is place.tensors]
    found: dict[str, str] = {}
    for name in place.tensors:
        parts = tuple(str(name).split("."))
        if parts[: len(place.prefix)] != place.prefix or _belongs(parts, part, place, inside):
            continue
        plain = ".".join(p for p in parts[len(place.prefix) :] if p not in WRAPPERS)
        if plain in found:
            raise CheckpointError(
                f"{path}: {found[plain]!r} and {name!r} are both {plain!r} of the "
                f"{NETWORKS[part].name}: save the one that is meant"
            )
        found[plain] = name
    return {plain: place.tensors[name] for plain, name in found.items()}


def _belongs(
    parts: tuple[str, ...], part: Part, place: Place, others: list[tuple[str, ...]]
) -> bool:
    """Whether a name under the prefix of `place` is that of the other network in the same dict."""
    for prefix in others:
        if prefix == place.prefix:
            of_vae = parts[len(prefix)] in VAE_MODULES
            if of_vae == (NETWORKS[part].argument == "var"):
                return True
        elif len(prefix) > len(place.prefix) and parts[: len(prefix)] == prefix:
            return True
    return False
