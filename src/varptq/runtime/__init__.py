"""Who computes a quantized model. A runtime takes a `QuantizedPipeline` and knows of no files."""

from varptq.runtime.resolve import RUNTIMES, resolve

__all__ = ["RUNTIMES", "resolve"]
