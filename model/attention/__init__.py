"""Attention over paged K/V behind one protocol."""
