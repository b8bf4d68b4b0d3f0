"""Quantized models on disk: a folder of model.safetensors and config.json (docs/artifact.md)."""

from varptq.artifact.load import load
from varptq.artifact.save import save

__all__ = ["load", "save"]
