"""The names in the study of 4 bits, which `quality4bit` measures and `quality_report` shows."""

from __future__ import annotations

from varptq.analyze.sensitivity import GROUPS

NAME = "quality4bit"
MODELS = ("demo", "twin")
GROUP_NAMES = tuple(GROUPS)
