"""Compute the LoRA operation in Triton kernels, at each row's own rank."""
