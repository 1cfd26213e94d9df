"""Whether to pipeline a pull by layers, from measured parts."""
