"""The native core: C++ kernels behind a C interface, their build and their ctypes binding.

build.py compiles `src/` into one shared object beside itself; binding.py loads it and gives typed
functions on torch tensors. Nothing here decides what runs where: that is the runtimes' business,
and without the core they take torch's own integer operations.
"""
