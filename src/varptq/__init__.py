"""varptq: post-training quantization for visual autoregressive (next-scale) image models."""

from varptq.artifact import save
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.methods import quantize
from varptq.errors import VarptqError
from varptq.models.generate import Output, generate
from varptq.models.pipeline import Pipeline, build_model, load_model
from varptq.quant.config import QuantConfig
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime import load

__version__ = "0.1.0"

__all__ = [
    "CalibrationConfig",
    "Output",
    "Pipeline",
    "QuantConfig",
    "QuantizedPipeline",
    "VarptqError",
    "build_model",
    "generate",
    "load",
    "load_model",
    "quantize",
    "save",
]
