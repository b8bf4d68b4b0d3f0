"""A quantized model ready to use: a `Pipeline` that also knows how it was quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig


@dataclass(kw_only=True)
class QuantizedPipeline(Pipeline):
    """Quantized transformer with the float VQVAE.

    method: name of the method, e.g. "sas". theta: threshold of shift-and-sum, None when it is off.
    runtime: who computes ("simulated": float arithmetic on dequantized codes). report: what
    calibration measured, plain JSON values. calibration: its settings as a dict; seed: of the whole
    run.
    """

    config: QuantConfig
    method: str
    theta: float | None = None
    runtime: str = "simulated"
    seed: int = 0
    calibration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
