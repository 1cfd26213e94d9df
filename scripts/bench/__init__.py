"""Benchmarks: a folder for each, with what measures (`python -m scripts.bench.NAME`) and what draws (`….NAME.draw`).

The modules beside the folders are what several benchmarks share.
"""
