"""The names in the study of 4 bits, which `quality4bit` measures and `quality_report` shows."""

from __future__ import annotations

from varptq.analyze.sensitivity import GROUPS

NAME = "quality4bit"
MODELS = ("demo", "twin")
GROUP_NAMES = tuple(GROUPS)
# Presets on uniform steps in groups, which most runs are about, and their finer form.
GROUPED = "w4a4+groups"
FINER = f"{GROUPED}+qk6+v6+g32"
HEAD_4 = f"{GROUPED}, head 4 bits"
# What users choose from; the last runs measure it, on images that nothing was chosen on.
OFFERED = ("w4a4", "bops1", "best", "w2a8", "w3a8", "w4a8", "w6a6", "w8a8")
TUNABLE = ("w4a4", "bops1", "best", "w2a8")
LAST, TUNED_LAST = 13, 14
