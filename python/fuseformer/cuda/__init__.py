"""The CUDA C++ kernels: loading what was compiled, and calls of it like those of other backends."""
