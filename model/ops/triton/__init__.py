"""Compute what lies between a layer's matrices in Triton kernels."""
