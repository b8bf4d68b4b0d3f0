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
LAST, TUNED_LAST, PARTS_LAST = LAST_RUNS = 13, 14, 15
# Shift-and-sum needs values on even steps and room for an order in their byte: `w6a6` alone.
WITH_PARTS = (
    *(("w4a4", "resample"), ("bops1", "resample"), ("best", "resample")),
    *(("w6a6", "resample"), ("w6a6", "shift")),
)
