"""Serve a page on which administrators see the cluster live: static files, and a stream of what changed."""
