"""The rows of the study "proof", which `proof` measures and `proof_report` shows."""

from __future__ import annotations

# Of the results, by model.
NAMES = {"demo": "proof", "demo-text": "proof_text"}
NAME = NAMES["demo"]
WIDTHS = ("w6a6+paper", "w4a8+paper", "w4a6+paper", "w4a4+paper")
METHODS = ("rtn", "brecq", "brecq+shift", "brecq+resample", "sas", "sas+litevar")
SEEDS = (0, 1, 2)
