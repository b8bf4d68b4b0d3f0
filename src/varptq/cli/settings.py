"""Configs, calibrations and sizes as the command line gives them: by name, in a file, in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq.errors import ConfigError, InputError

if TYPE_CHECKING:
    from varptq.calibrate.config import CalibrationConfig
    from varptq.quant.config import QuantConfig

FILE_TYPES = {".json", ".yaml", ".yml"}
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>[kKMGT]?)(?P<binary>i?)B?")


def read_config(text: str, group_size: int | None) -> QuantConfig:
    """A preset or a file; `group_size` puts weights in groups that must divide every layer."""
    from varptq.calibrate.methods import METHODS, PARTS
    from varptq.quant.config import QuantConfig

    is_file = Path(text).suffix.lower() in FILE_TYPES
    for word in () if is_file else text.split("+"):
        if word in METHODS or word in PARTS:
            usage = word if word in METHODS else f"rtn+{word}"
            raise ConfigError(
                f"config {text!r}: {word} belongs to the method: give --method {usage}"
            )
    config = QuantConfig.from_file(text) if is_file else QuantConfig.preset(text)
    if group_size is None:
        return config
    weight = config.linear.weight
    if weight is None:
        raise ConfigError(f"group size {group_size}: config {text!r} keeps weights in float")
    grouped: dict[str, Any] = {"strategy": "group", "group_size": group_size, "fallback": False}
    grouped["row_multiple"] = None
    rules = (
        rule.replace(weight=rule.weight.replace(**grouped)) if rule.weight else rule
        for rule in config.rules
    )
    linear = config.linear.replace(weight=weight.replace(**grouped))
    return config.replace(linear=linear, rules=tuple(rules))


def read_calibration(
    text: str | None,
    effort: str | None = None,
    *,
    samples: int | None = None,
    steps: int | None = None,
    tune: int | None = None,
    budget: float | None = None,
    memory: str | None = None,
) -> CalibrationConfig:
    """A preset or a file, with the given settings replaced."""
    from varptq.calibrate.config import CalibrationConfig

    if text is not None and effort is not None:
        raise InputError(f"calibration: both {text!r} and --effort {effort} given; give one")
    text = text or effort or "default"
    is_file = Path(text).suffix.lower() in FILE_TYPES
    base = CalibrationConfig.from_file(text) if is_file else CalibrationConfig.preset(text)
    given = {"num_samples": samples, "steps": steps, "tune_steps": tune, "budget": budget}
    given["memory_gb"] = None if memory is None else parse_size(memory) / 2**30
    return base.replace(**{name: value for name, value in given.items() if value is not None})


def parse_size(text: str) -> int:
    """Bytes of "8GB", "500 MB", "1.5TiB" or "4096"; a lone K, M, G or T is decimal. Raises
    `InputError`."""
    match = SIZE.fullmatch(text.strip())
    size = 0
    if match:
        base = 1024 if match["binary"] else 1000
        size = int(float(match["number"]) * base ** " KMGT".index((match["unit"] or " ").upper()))
    if size < 1:
        raise InputError(f"size {text!r}: expected a number of bytes such as 8GB, 500MB or 2GiB")
    return size
