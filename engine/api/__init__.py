"""Serve the OpenAI-compatible API: bodies become requests, and what is generated becomes responses."""
