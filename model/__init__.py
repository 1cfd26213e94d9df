"""The model computes: a paged-KV Llama family forward pass over rows of mixed adapters."""
