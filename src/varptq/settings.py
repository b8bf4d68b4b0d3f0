"""Base of every configuration object: frozen, validated, unknown keys refused, to and from plain
dicts.

The same object comes from Python, a JSON or YAML file, or command-line flags, and is stored in the
artifact.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from varptq.errors import ConfigError

# Far above any settings file, and quick to read.
MAX_FILE_BYTES = 2**20


class SettingError(ConfigError):
    """A bad field: `path` leads to it from the object being made, `problem` says what is wrong.

    Both are kept apart so that an enclosing object can put its own path in front.
    """

    def __init__(self, owner: str, path: tuple[int | str, ...], problem: str) -> None:
        place = ".".join(str(part) for part in path)
        super().__init__(f"{owner}: {place}{problem}" if place else f"{owner}{problem}")
        self.path, self.problem = path, problem


def describe(error: ValidationError, owner: str) -> SettingError:
    """The first problem in one line: field, value, what was expected."""
    first = error.errors()[0]
    path = first["loc"]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, SettingError):
        return SettingError(owner, (*path, *inner.path), inner.problem)
    if first["type"] == "extra_forbidden":
        return SettingError(owner, path[:-1], f": unknown field {path[-1]!r}")
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" is {value!r}"
    return SettingError(owner, path, f"{shown}: {message}")


class Settings(BaseModel):
    """A frozen configuration object. Construction with a bad value raises `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise describe(error, type(self).__name__) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # `yes` in YAML; as a number it would be 1.
        if _holds_truth(value):
            kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
            if bool not in kinds and (int in kinds or float in kinds):
                raise ValueError("expected a number")
        return value

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again. Fields left to their defaults stay
        so: a default that depends on other fields is computed again."""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**said, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; fields left unset in a partial rule stay out."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The object that these plain values describe; raises `ConfigError` as the constructor
        does."""
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__}: expected a mapping, got {type(values).__name__}")
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `.json`, `.yaml` or `.yml` file."""
        path = Path(path)
        try:
            return cls.from_dict(_parse(_read(path), path))
        except RecursionError:
            raise ConfigError(f"configuration {path}: nested too deeply") from None


def _holds_truth(value: Any) -> bool:
    """Whether it is true or false, or a list with one of these."""
    return isinstance(value, bool) or (
        isinstance(value, list | tuple) and any(map(_holds_truth, value))
    )


def _kinds(annotation: Any) -> list[Any]:
    """The types in an annotation: str, int and None of `dict[str, int] | None`."""
    parts = get_args(annotation)
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]


def _read(path: Path) -> str:
    """The text of a settings file, which must be an ordinary file and not large."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"configuration {path}: not an ordinary file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: cannot be read ({error})") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(
            f"configuration {path}: larger than {MAX_FILE_BYTES} bytes, so not settings"
        )
    return text


def _parse(text: str, path: Path) -> Any:
    if path.suffix not in {".yaml", ".yml"}:
        try:
            return json.loads(text, object_pairs_hook=_of_pairs)
        except _TwiceError as error:
            raise ConfigError(f"configuration {path}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"configuration {path}: not valid JSON ({error})") from None
    import yaml

    class Loader(yaml.SafeLoader):
        """A mapping with one key twice is refused."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            # What is malformed otherwise is the loader's to refuse.
            keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            _of_pairs([(key.value, None) for key in keys if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except _TwiceError as error:
        raise ConfigError(f"configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"configuration {path}: not valid YAML ({line})") from None


class _TwiceError(Exception):
    """One key stands twice in a mapping, and its values may differ."""


def _of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"field {twice!r} stands twice; leave one of them")
    return found
