"""Triton kernels of the integer runtime "cuda": one file per kernel, held against the reference."""
