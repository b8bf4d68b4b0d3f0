"""varptq: post-training quantization for visual autoregressive (next-scale) image models.

The public names load their modules on first use, so that `import varptq` and `varptq --help` need
no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varptq.artifact import save
    from varptq.calibrate.config import CalibrationConfig
    from varptq.calibrate.quantize import quantize
    from varptq.editing import EditResult, edit
    from varptq.errors import VarptqError
    from varptq.models.class_names import read_class_names
    from varptq.models.generate import Output, generate
    from varptq.models.pipeline import Pipeline, build_model, load_model
    from varptq.models.prompt_files import load_features, read_prompts, save_features
    from varptq.models.text_encoder import T5Encoder
    from varptq.quant.config import QuantConfig
    from varptq.quant.pipeline import QuantizedPipeline
    from varptq.runtime import load

__version__ = "0.1.0"

__all__ = [
    "CalibrationConfig",
    "EditResult",
    "Output",
    "Pipeline",
    "QuantConfig",
    "QuantizedPipeline",
    "T5Encoder",
    "VarptqError",
    "build_model",
    "edit",
    "generate",
    "load",
    "load_features",
    "load_model",
    "quantize",
    "read_class_names",
    "read_prompts",
    "save",
    "save_features",
]

_HOMES = {
    "CalibrationConfig": "calibrate.config",
    "EditResult": "editing",
    "Output": "models.generate",
    "Pipeline": "models.pipeline",
    "QuantConfig": "quant.config",
    "QuantizedPipeline": "quant.pipeline",
    "T5Encoder": "models.text_encoder",
    "VarptqError": "errors",
    "build_model": "models.pipeline",
    "edit": "editing",
    "generate": "models.generate",
    "load": "runtime",
    "load_features": "models.prompt_files",
    "load_model": "models.pipeline",
    "quantize": "calibrate.quantize",
    "read_class_names": "models.class_names",
    "read_prompts": "models.prompt_files",
    "save": "artifact",
    "save_features": "models.prompt_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*globals(), *_HOMES))
