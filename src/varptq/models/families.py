"""The families by name: a plain table, one line each."""

from __future__ import annotations

from pathlib import Path

from varptq.errors import ConfigError
from varptq.models.family import Family
from varptq.models.infinity.family import INFINITY_FAMILY
from varptq.models.shards import read_all
from varptq.models.var.family import VAR_FAMILY
from varptq.models.wrappers import holds

FAMILIES: dict[str, Family] = {"var": VAR_FAMILY, "infinity": INFINITY_FAMILY}
# What a transformer is taken for that is none of the families', so that one reader refuses it.
USUAL = "var"


def family(name: str) -> Family:
    """The row `name`. Raises `ConfigError` listing the known ones."""
    if name not in FAMILIES:
        raise ConfigError(f"family {name!r}: unknown, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(path: Path) -> str:
    """Name of the family whose transformer is in a checkpoint. Raises `CheckpointError` for a file
    that cannot be read."""
    content = read_all(path)
    known = (name for name, row in FAMILIES.items() if row.part and holds(content, row.part))
    return next(known, USUAL)
