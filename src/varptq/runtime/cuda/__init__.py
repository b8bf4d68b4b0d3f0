"""Triton kernels of the integer runtime "cuda", one file each, tested against the reference."""
