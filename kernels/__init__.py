"""Triton kernels of fuseformer: each module holds one family, its configs and its launchers."""
