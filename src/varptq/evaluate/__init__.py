"""Measures of how close a quantized model stays to the float one. Knows pipelines, not how they
were made."""
