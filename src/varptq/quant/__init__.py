"""Quantizers as pure functions, their configuration, and conversion of a float model to simulated
quantization."""
