"""The families by name: a plain table, one line each."""

from __future__ import annotations

from varptq.errors import ConfigError
from varptq.models.family import Family
from varptq.models.var.family import VAR_FAMILY

FAMILIES: dict[str, Family] = {"var": VAR_FAMILY}


def family(name: str) -> Family:
    """The row `name`. Raises `ConfigError` listing the known ones."""
    if name not in FAMILIES:
        raise ConfigError(f"family {name!r}: unknown, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
