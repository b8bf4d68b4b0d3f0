"""What benchmarks/speed/gpu.py runs on a GPU: the tests, the kernels, whole images, the page."""
