"""Attend over paged K/V in Triton kernels."""
