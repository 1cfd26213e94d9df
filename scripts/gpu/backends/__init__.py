"""Backends of a CUDA device and of a dry run, behind one protocol."""
