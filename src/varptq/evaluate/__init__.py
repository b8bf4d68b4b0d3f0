"""Measures of how close a quantized model stays to the float one. It knows pipelines, but
not how they were made."""
