"""The native core: C++ kernels behind a C interface, their build and their ctypes binding.

build.py compiles `src/`, a folder per operator, into one shared object beside itself; binding.py
loads it; quantize.py, linear.py, attention.py, convolution.py, sampler.py and phi.py are the
operators as typed functions on torch CPU tensors. Nothing here decides what runs where: that is the
runtimes' business, and without the core they take torch's own integer operations.
"""
