"""A quantized model ready to use: a `Pipeline` that also knows how it was quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from varptq.models.autoencoder import Autoencoder
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import Transformer
from varptq.quant.config import QuantConfig


@dataclass(kw_only=True)
class QuantizedPipeline(Pipeline):
    """Quantized transformer and autoencoder.

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

    @property
    def image_by_image(self) -> bool:
        return self.runtime != "simulated" and self.device.type == "cpu"

    @classmethod
    def of(cls, pipe: Pipeline, var: Transformer, vae: Autoencoder, **facts: Any) -> Self:
        """`var` and `vae` in the place of the float networks of `pipe`, with the fields of this
        class."""
        return cls(
            var,
            vae,
            pipe.name,
            pipe.class_names,
            dict(pipe.sources),
            family=pipe.family,
            encoder=pipe.encoder,
            chosen=pipe.chosen,
            **facts,
        )
