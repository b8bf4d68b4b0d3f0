"""Which state dict in a checkpoint is meant, and the names its tensors have without wrappers.

Training code puts state dicts into dicts ("model", "state_dict", upstream's "trainer") and modules
into modules ("module.", "_orig_mod.", "var."). A transformer and a VQVAE are known by one tensor
each, which shows where they lie and what stands before their names. What is there once is taken;
two of a kind, say trained weights and their average, are a choice that is left to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from varptq.errors import CheckpointError

Part = Literal["var", "vae"]
# A tensor that every network of the kind has and no other.
ANCHORS: dict[Part, str] = {"var": "pos_1LC", "vae": "quantize.embedding.weight"}
NAMES: dict[Part, str] = {"var": "VAR transformer", "vae": "VQVAE"}
OTHER: dict[Part, Part] = {"var": "vae", "vae": "var"}
# What upstream's trainer calls them.
TRAINER_PARTS: dict[Part, str] = {"var": "var_wo_ddp", "vae": "vae_local"}
VAE_MODULES = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
# Names that wrappers put into a module's path, at its beginning or before any of its parts.
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
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
    found = list(_places(content, ANCHORS[part]))
    if len(found) > 1:
        labels = " and ".join(place.label for place in found)
        raise CheckpointError(
            f"{path}: holds {len(found)} of {NAMES[part]}, {labels}: save the one that is meant, "
            f'e.g. torch.save({found[-1].remedy}, "{part}.pth")'
        )
    others = list(_places(content, ANCHORS[OTHER[part]]))
    if found:
        return _named(found[0], part, others, path)
    if others:
        labels = " and ".join(place.label for place in others if place.keys or place.prefix)
        raise CheckpointError(
            f"{path}: holds a {NAMES[OTHER[part]]}{labels and f' under {labels}'} and no "
            f"{NAMES[part]} ({TRAINER_PARTS[part]!r} in files of VAR's trainer), is this a "
            f"{'VAR' if part == 'var' else 'VQVAE'} checkpoint? Give it as {OTHER[part]}="
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


def _places(content: Mapping[Any, Any], anchor: str) -> Iterator[Place]:
    """Every place of a network with this tensor; one dict that is there twice counts once."""
    seen: set[int] = set()

    def walk(content: Mapping[Any, Any], keys: tuple[str, ...]) -> Iterator[Place]:
        if id(content) in seen:
            return
        seen.add(id(content))
        for name, value in content.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, Tensor):
                prefix = _prefix(name, anchor)
                if prefix is not None:
                    yield Place(keys, prefix, content)
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
                f"{path}: {found[plain]!r} and {name!r} are both {plain!r} of the {NAMES[part]}: "
                "save the one that is meant"
            )
        found[plain] = name
    return {plain: place.tensors[name] for plain, name in found.items()}


def _belongs(
    parts: tuple[str, ...], part: Part, place: Place, others: list[tuple[str, ...]]
) -> bool:
    """Whether a name under the prefix of `place` is that of the other network in the same dict."""
    for prefix in others:
        if prefix == place.prefix:
            if (parts[len(prefix)] in VAE_MODULES) == (part == "var"):
                return True
        elif len(prefix) > len(place.prefix) and parts[: len(prefix)] == prefix:
            return True
    return False
