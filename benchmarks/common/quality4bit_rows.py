"""The names in the study of 4 bits, which `quality4bit` measures and `quality_report` shows."""

from __future__ import annotations

from benchmarks.common import fpqvar, orbitquant
from varptq.analyze.sensitivity import GROUPS
from varptq.quant.config import LayerRule, QuantConfig

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
# Labels of the paper's assignment, by what rounds it.
PAPER_LABELS = ("rtn", "brecq", "sas")


def config_of(label: str) -> QuantConfig:
    """What the bits of a final are counted by: a preset, whatever stands behind its name, or one of
    what presets are held against."""
    name = label.split(", gptq")[0].split(", tuned")[0]
    if name == HEAD_4:
        return head(QuantConfig.preset(GROUPED), 4, 4)
    if name == "fpqvar":
        return fpqvar.account_config()
    if name in orbitquant.WIDTHS:
        return orbitquant.account_config(*orbitquant.WIDTHS[name])
    if name == "litevar" or name in PAPER_LABELS:
        return QuantConfig.preset("w4a4+paper" + ("+litevar" if name == "litevar" else ""))
    return QuantConfig.preset(name.replace(" released", "+paper+released"))


def head(config: QuantConfig, weight_bits: int, input_bits: int = 8) -> QuantConfig:
    """Other bits at the head."""
    other = QuantConfig.preset(f"w{weight_bits}a{input_bits}+paper").linear
    return config.with_rules(LayerRule(targets="head", weight=other.weight, input=other.input))
