"""The runtimes that execute a quantized model, and loading an artifact onto one of them."""

from varptq.runtime.load import load
from varptq.runtime.resolve import RUNTIMES, resolve

__all__ = ["RUNTIMES", "load", "resolve"]
